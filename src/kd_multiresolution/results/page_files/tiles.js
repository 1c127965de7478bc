// Tiles of all images, sorted and filtered.

const layer = (base64, alt) => element("img", { src: `data:image/webp;base64,${base64}`, alt, decoding: "async" });

const outlines = (label, paths) => {
  const svg = drawn("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(...paths.filter(([, d]) => d).map(([kind, d]) => drawn("path", { class: kind, d })));
  return svg;
};

const panels = (image, large) => {
  const panel = (title, children) => {
    const box = element("span", {}, children);
    box.style.aspectRatio = `${image.width} / ${image.height}`;
    return element("span", { className: "panel" }, [box, element("span", { textContent: title, ariaHidden: "true" })]);
  };
  const found = [];
  if (image.picture) found.push(panel("image", [layer(image.picture, `image ${image.name}`)]));
  if (image.mask !== null) found.push(panel("true mask", [outlines(`true mask of ${image.name}`, [["mask", image.mask]])]));
  if (image.picture && image.heat) {
    found.push(panel("heat map", [layer(image.picture, ""), layer(image.heat, `heat map of ${image.name}`)]));
  }
  if (image.picture && image.outline !== null) {
    const paths = [["halo", image.outline], ["marked", image.outline]];
    if (large && image.mask) paths.push(["true", image.mask]);
    const title = !image.outline ? "nothing marked" : "marked";
    found.push(panel(large && image.mask ? `${title} (dashed: true mask)` : title,
      [layer(image.picture, ""), outlines(`${title} in ${image.name}`, paths)]));
  }
  if (!found.length) return element("span", { className: "none", textContent: "no picture" });
  const proportions = image.width / image.height;
  const shape = proportions > 1.5 ? " wide" : found.length === 1 ? " single" : "";
  const made = element("span", { className: `panels${shape}` }, found);
  made.style.setProperty("--proportions", proportions * (found.length > 2 ? 1 : found.length === 2 ? 2 : 1));
  return made;
};

const scoreText = (image) =>
  data.normalised ? `${image.score.toFixed(3)} (raw ${number(image.raw)})` : `raw ${number(image.raw)}`;

const tiles = new Map();
const tileOf = (image) => {
  if (!tiles.has(image)) {
    const badge = element("em", { className: "badge" });
    const button = element("button", { type: "button", className: "tile" }, [
      panels(image, false),
      element("span", { className: "caption" }, [
        element("b", { textContent: image.name }),
        element("span", {}, [badge, scoreText(image)]),
      ]),
    ]);
    button.addEventListener("click", () => enlarge(image));
    tiles.set(image, { item: element("li", {}, [button]), badge, button });
  }
  return tiles.get(image);
};

const folderOf = (image) => image.name.slice(0, Math.max(0, image.name.lastIndexOf("/")));
const choices = { sort: byId("sort"), folder: byId("folder"), outcome: byId("outcome") };
const orders = {
  highest: (a, b) => b.raw - a.raw,
  lowest: (a, b) => a.raw - b.raw,
  nearest: (a, b) => Math.abs(toPlace(a.raw) - toPlace(threshold)) - Math.abs(toPlace(b.raw) - toPlace(threshold)),
  name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
};

const folders = new Map();
for (const image of images) folders.set(folderOf(image), (folders.get(folderOf(image)) ?? 0) + 1);
choices.folder.append(new Option(`all (${images.length})`, "all"));
const folderNames = [...folders.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
folderNames.forEach((name, index) => choices.folder.append(new Option(`${name || "."} (${folders.get(name)})`, index)));
const present = [
  ...(goods.length ? ["false", "passed"] : []),
  ...(defectives.length ? ["miss", "found"] : []),
  ...(unknown.length ? ["called", "uncalled"] : []),
];
choices.outcome.append(...["all", ...present].map((outcome) => new Option("", outcome)));

let chosen = [];
let limit = AT_ONCE;
const showTiles = () => {
  const { sort, folder, outcome } = choices;
  chosen = images
    .filter((image) => folder.value === "all" || folderOf(image) === folderNames[folder.value])
    .filter((image) => outcome.value === "all" || outcomeOf(image) === outcome.value)
    .sort(orders[sort.value]);
  const shown = chosen.slice(0, limit);
  const items = shown.map((image) => {
    const { item, badge, button } = tileOf(image);
    const said = outcomeOf(image);
    if (badge.dataset.outcome !== said) {
      badge.dataset.outcome = said;
      badge.className = `badge ${said}`;
      badge.textContent = OUTCOMES[said];
      button.ariaLabel = `Enlarge ${image.name}, ${OUTCOMES[said]}, score ${scoreText(image)}`;
    }
    return item;
  });
  const list = byId("tiles");
  // Only where something has changed: a tile that stays keeps the focus.
  if (items.length !== list.children.length || items.some((item, index) => list.children[index] !== item)) {
    list.replaceChildren(...items);
  }
  byId("shown").textContent =
    shown.length === chosen.length ? plural(chosen.length, "image") : `${shown.length} of ${chosen.length} images`;
  byId("more").hidden = shown.length === chosen.length;
  byId("more").textContent = `Show ${Math.min(AT_ONCE, chosen.length - shown.length)} more`;
};
for (const choice of Object.values(choices)) {
  choice.addEventListener("change", () => {
    limit = AT_ONCE;
    showTiles();
  });
}
byId("more").addEventListener("click", () => {
  limit += AT_ONCE;
  showTiles();
});
