"The command line: `symmbfn generate`, `symmbfn evaluate`, and `python -m symmbfn` for the same."

import sys

_commands = {"generate": "generation", "evaluate": "evaluation"}


def main():
    from importlib import import_module

    name, *words = sys.argv[1:] or [""]
    if name not in _commands:
        sys.exit(
            f"symmbfn {'knows no command ' + name + ': ' if name else ''}give one of {', '.join(_commands)}, and --help after it for more."
        )
    import_module(f"symmbfn.{_commands[name]}").main(words)


if __name__ == "__main__":
    main()
