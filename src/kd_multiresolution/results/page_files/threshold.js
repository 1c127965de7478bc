// What a threshold costs, and the lines that set it.

const counts = () => {
  const found = Object.fromEntries(Object.keys(OUTCOMES).map((outcome) => [outcome, 0]));
  for (const image of images) found[outcomeOf(image)] += 1;
  return found;
};

const card = (kind, title, hits, of, what) => {
  const [from, to] = interval(hits, of);
  const range = kind === "unknown" ? "" : `; 95 % interval ${percent(from)} to ${percent(to)}`;
  return element("div", { className: `card ${kind}` }, [
    title,
    element("strong", { textContent: `${hits} of ${of}` }),
    element("small", { textContent: `${what}: ${percent(hits / of)}${range}` }),
  ]);
};

const tell = () => {
  const found = counts();
  const cards = [];
  if (goods.length) cards.push(card("good", "False alarms", found.false, goods.length, "of the good images"));
  if (defectives.length) cards.push(card("defective", "Misses", found.miss, defectives.length, "of the defective images"));
  if (unknown.length) {
    cards.push(card("unknown", "Called defective", found.called, unknown.length, "of the images without a label"));
  }
  byId("cards").replaceChildren(...cards);
  if (drawRoc.move) drawRoc.move(found.false / goods.length, 1 - found.miss / defectives.length);
  for (const option of byId("outcome").options) {
    const all = option.value === "all";
    option.textContent = `${all ? "all" : MANY[option.value]} (${all ? images.length : found[option.value]})`;
  }
  const place = toPlace(threshold);
  byId("normalised").textContent = data.axis ? `normalised ${place.toFixed(3)}` : "";
  const isStart = threshold === start;
  byId("reset").disabled = isStart;
  byId("reset").hidden = data.threshold === null;
  byId("moved").textContent =
    data.threshold === null ? "the model has none" : isStart ? "this is the model's" : `the model's is ${exact(start)}`;
  for (const code of byId("settings").querySelectorAll("code")) {
    const line = code.dataset.line
      .replaceAll("{threshold}", exact(threshold))
      .replaceAll("{sensitivity}", exact(1 - place))
      .replaceAll("{false_alarms}", found.false);
    // Each word in an element of its own: a line breaks between them, and not after a hyphen.
    code.replaceChildren(...line.split(/(\s)/).map((word) => (word.trim() ? element("i", { textContent: word }) : word)));
  }
  const said = [
    `raw score ${number(threshold)}`,
    ...(goods.length ? [plural(found.false, "false alarm")] : []),
    ...(defectives.length ? [`${found.miss} missed`] : []),
    ...(unknown.length ? [`${found.called} called defective`] : []),
  ];
  slider.setAttribute("aria-valuetext", said.join(", "));
};

let pending = 0;
const setThreshold = (raw, from) => {
  threshold = raw;
  if (from !== slider) slider.value = Math.round((STEPS * (toPlace(raw) - low)) / (high - low));
  if (from !== byId("raw")) byId("raw").value = exact(raw);
  moveLine();
  tell();
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => showTiles());
};

byId("raw").addEventListener("input", (event) => {
  const raw = event.target.valueAsNumber;
  if (Number.isFinite(raw)) setThreshold(raw, event.target);
});
byId("reset").addEventListener("click", () => setThreshold(start));

for (const { where, line } of data.settings) {
  const code = element("code", {});
  code.dataset.line = line;
  const copy = element("button", { type: "button", textContent: "Copy", ariaLabel: `Copy, ${where}` });
  copy.addEventListener("click", async () => {
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Selected"; // some browsers give a page of a file no clipboard
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  byId("settings").append(element("li", {}, [element("span", { textContent: where }), code, copy]));
}
