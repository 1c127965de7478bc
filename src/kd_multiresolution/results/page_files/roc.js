// The ROC curve, and the point on it.

const drawRoc = () => {
  if (!data.roc) return;
  byId("roc-figure").hidden = false;
  byId("roc-caption").textContent = `ROC curve, area below it ${data.roc.area.toFixed(4)}`;
  const side = 268;
  const [left, top] = [62, 10];
  const x = (share) => left + share * side;
  const y = (share) => top + (1 - share) * side;
  const svg = byId("roc");
  svg.setAttribute("viewBox", `0 0 ${left + side + 26} ${top + side + 46}`);
  const parts = [];
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(drawn("line", { class: "grid", x1: x(share), x2: x(share), y1: y(0), y2: y(1) }));
    parts.push(drawn("line", { class: "grid", x1: x(0), x2: x(1), y1: y(share), y2: y(share) }));
    parts.push(drawn("text", { x: x(share), y: y(0) + 17, "text-anchor": "middle" }, `${100 * share} %`));
    parts.push(drawn("text", { x: left - 7, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
  }
  const middle = { class: "strong", "text-anchor": "middle" };
  parts.push(drawn("text", { ...middle, x: x(0.5), y: y(0) + 39 }, "false alarms among good images"));
  parts.push(drawn("text", { ...middle, transform: `translate(13 ${y(0.5)}) rotate(-90)` }, "defective images found"));
  parts.push(drawn("path", { class: "curve", d: `M${data.roc.points.map(([a, b]) => `${x(a)} ${y(b)}`).join("L")}` }));
  parts.push(drawn("circle", { class: "point", id: "point", r: 6.5 }));
  svg.replaceChildren(...parts);
  drawRoc.move = (falseAlarms, found) => {
    byId("point").setAttribute("cx", x(falseAlarms));
    byId("point").setAttribute("cy", y(found));
  };
};
