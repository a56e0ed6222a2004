__version__ = "0.1.0"

_public = {
    "encode": "structures",
    "decode": "structures",
    "load_data": "datasets",
    "load": "model",
    "generate": "generation",
    "evaluate": "evaluation",
    "relax": "screening",
    "screen": "screening",
    "predict": "prediction",
    "vary": "variation",
    "export": "exporting",
    "finetune": "finetuning",
}


def __getattr__(name):  # import symmbfn stays instant: torch and pymatgen load on first use
    if name not in _public:
        raise AttributeError(f"module 'symmbfn' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"symmbfn.{_public[name]}"), name)


def __dir__():
    return sorted([*globals(), *_public])
