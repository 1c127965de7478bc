// The histogram, whose line can be dragged.

const histogram = byId("histogram");
const slider = byId("slider");
const plot = { left: 46, right: 14, top: 22, height: 250, below: data.axis ? 58 : 42 };
const groups = unknown.length === images.length
  ? [{ kind: "unknown", said: unknown.length === 1 ? "image" : "images", of: unknown, up: true }]
  : [
      { kind: "good", said: "good", of: goods, up: true },
      { kind: "defective", said: "defective", of: defectives, up: false },
      { kind: "unknown", said: "unknown", of: unknown, up: true },
    ].filter((group) => group.of.length);
for (const group of groups) {
  group.bins = new Array(BINS).fill(0);
  for (const image of group.of) {
    const bin = Math.floor((BINS * (toPlace(image.raw) - low)) / (high - low));
    group.bins[Math.min(BINS - 1, Math.max(0, bin))] += 1;
  }
}
// Of more than two kinds, those without a truth stand on top of the good ones.
const raised = groups.length === 3 || (groups.length === 2 && groups[1].kind === "unknown" && groups[0].up);
if (raised) {
  const [base, top] = [groups.find((group) => group.kind === "good"), groups.find((group) => group.kind === "unknown")];
  if (base && top) top.base = base.bins;
}
const tallest = (up) => Math.max(0, ...Array.from({ length: BINS }, (_, bin) =>
  groups.filter((group) => group.up === up).reduce((sum, group) => sum + group.bins[bin], 0)));
const tops = { up: tallest(true), down: tallest(false) };

let plotWidth = 600;
const across = (place) => plot.left + (plotWidth * (place - low)) / (high - low);

const drawHistogram = () => {
  const width = Math.max(260, histogram.parentElement.clientWidth);
  plotWidth = width - plot.left - plot.right;
  const height = plot.top + plot.height + plot.below;
  histogram.setAttribute("viewBox", `0 0 ${width} ${height}`);
  histogram.style.height = `${height}px`;
  slider.style.width = `${plotWidth + 16}px`;
  slider.style.marginLeft = `${plot.left - 8}px`;

  const unit = plot.height / Math.max(1, tops.up + tops.down);
  const base = plot.top + unit * tops.up;
  const bottom = plot.top + plot.height;
  const parts = [drawn("rect", { class: "above", id: "above", y: plot.top, height: plot.height })];
  for (const count of ticks(0, Math.max(tops.up, tops.down, 1), 4).filter((count) => Number.isInteger(count))) {
    for (const y of new Set([base - count * unit, base + count * unit])) {
      if (y < plot.top - 1 || y > bottom + 1) continue;
      parts.push(drawn("line", { class: "grid", x1: plot.left, x2: width - plot.right, y1: y, y2: y }));
      parts.push(drawn("text", { x: plot.left - 7, y: y + 4, "text-anchor": "end" }, count));
    }
  }
  const bar = plotWidth / BINS;
  for (const group of groups) {
    group.bins.forEach((count, bin) => {
      if (!count) return;
      const begin = (group.base ? group.base[bin] : 0) * unit;
      const y = group.up ? base - begin - count * unit : base;
      parts.push(drawn("rect", {
        class: `bar-${group.kind}`, x: plot.left + bin * bar + 0.5, width: Math.max(1, bar - 1), y, height: count * unit,
      }));
    });
  }
  parts.push(drawn("line", { class: "axis", x1: plot.left, x2: width - plot.right, y1: base, y2: base }));
  for (const tick of ticks(low, high, width < 500 ? 4 : 8)) {
    const x = across(tick);
    parts.push(drawn("line", { class: "tick", x1: x, x2: x, y1: bottom, y2: bottom + 5 }));
    parts.push(drawn("text", { x, y: bottom + 18, "text-anchor": "middle" }, number(tick)));
    if (data.axis) parts.push(drawn("text", { x, y: bottom + 34, "text-anchor": "middle" }, number(toRaw(tick), 3)));
  }
  parts.push(drawn("text", { class: "strong", x: plot.left + plotWidth / 2, y: height - 4, "text-anchor": "middle" },
    data.axis ? "normalised score, raw score below it" : "raw score"));
  if (data.threshold !== null) {
    const x = across(toPlace(data.threshold));
    parts.push(drawn("line", { class: "line-model", x1: x, x2: x, y1: plot.top, y2: bottom }));
  }
  parts.push(drawn("line", { class: "line", id: "line", y1: plot.top - 4, y2: bottom + 4 }));
  parts.push(drawn("text", { class: "strong", id: "line-text", y: plot.top - 9 }));
  histogram.replaceChildren(...parts);
  moveLine();
};

const moveLine = () => {
  const x = Math.min(plot.left + plotWidth, Math.max(plot.left, across(toPlace(threshold))));
  const end = plot.left + plotWidth;
  byId("line").setAttribute("x1", x);
  byId("line").setAttribute("x2", x);
  byId("above").setAttribute("x", x);
  byId("above").setAttribute("width", Math.max(0, end - x));
  const text = byId("line-text");
  const room = end - x > 120;
  text.textContent = room ? "called defective →" : "← called good";
  text.setAttribute("x", room ? x + 2 : x - 2);
  text.setAttribute("text-anchor", room ? "start" : "end");
};

const dragTo = (event) => {
  const box = histogram.getBoundingClientRect();
  const share = (event.clientX - box.left - plot.left) / plotWidth;
  setThreshold(toRaw(low + (high - low) * Math.min(1, Math.max(0, share))));
};
histogram.addEventListener("pointerdown", (event) => {
  histogram.setPointerCapture(event.pointerId);
  dragTo(event);
  event.preventDefault();
});
histogram.addEventListener("pointermove", (event) => {
  if (histogram.hasPointerCapture(event.pointerId)) dragTo(event);
});
slider.addEventListener("input", () => setThreshold(toRaw(low + ((high - low) * slider.value) / STEPS), slider));
