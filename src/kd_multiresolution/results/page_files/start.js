// The first look.

byId("summary").textContent = [
  plural(images.length, "image"),
  ...(goods.length ? [`${goods.length} good`] : []),
  ...(defectives.length ? [`${defectives.length} defective`] : []),
].join(", ");
const upAndDown = new Set(groups.map((group) => group.up)).size > 1;
byId("histogram-caption").append("Scores", ...groups.map((group) => {
  const side = !upAndDown ? "" : group.up ? ", upwards" : ", downwards";
  const swatch = element("i", { className: `swatch ${group.kind}` });
  return element("span", {}, [swatch, `${group.of.length} ${group.said}${side}`]);
}));
byId("legend").hidden = !images.some((image) => image.heat);
drawRoc();
drawHistogram();
setThreshold(start);
new ResizeObserver(drawHistogram).observe(histogram.parentElement);
