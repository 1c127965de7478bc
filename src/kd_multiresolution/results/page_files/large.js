// One image, large.

const large = byId("large");
let current = null;
let row = []; // the images as they were sorted when the first one was enlarged
const fill = (image) => {
  current = image;
  byId("large-name").textContent = image.name;
  byId("large-panels").replaceChildren(panels(image, true));
  const truth = image.truth === null ? "not known" : image.truth ? "defective" : "good";
  const facts = [
    ["Score", scoreText(image)],
    ["Truth", truth],
    ["At this threshold", OUTCOMES[outcomeOf(image)]],
  ];
  if (image.percentile !== null) facts.push([`Among ${data.normals || "good images"}`, `${image.percentile} % score no higher`]);
  if (image.marked) {
    const { area, regions, boxes, frame } = image.marked;
    facts.push(["Marked", `${plural(area, "pixel")} in ${plural(regions, "region")}, of ${frame}`]);
    if (boxes.length) {
      const listed = boxes.map((box) => box.join(", ")).join("; ");
      facts.push([boxes.length < regions ? "Largest regions" : "Regions", `left, top, right, bottom: ${listed}`]);
    }
  }
  if (image.path) facts.push(["File", image.path]);
  byId("large-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  const at = row.indexOf(image);
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at >= row.length - 1;
};
const enlarge = (image) => {
  row = [...chosen];
  fill(image);
  large.showModal();
};
const step = (by) => {
  const next = row[row.indexOf(current) + by];
  if (next) fill(next);
};
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => large.close());
large.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
large.addEventListener("click", (event) => {
  if (event.target === large) large.close(); // beside it
});
