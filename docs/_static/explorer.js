// The map and the structures of docs/explorer.md, drawn by chemiscope from EXPLORER.
const parts = Object.fromEntries(["meta", "map", "structure", "info"].map((name) => {
  const part = document.createElement("div");
  part.id = `explorer-${name}`;
  document.getElementById("explorer").append(part);
  return [name, part.id];
}));
Chemiscope.DefaultVisualizer.load(parts, EXPLORER, new Chemiscope.Warnings());
