"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const images = data.images;
  // Folders that all images share tell none apart.
  while (images.every((image) => image.name.split("/").length > 2 && image.name.split("/")[0] === images[0].name.split("/")[0])) {
    for (const image of images) image.name = image.name.slice(image.name.indexOf("/") + 1);
  }
  const byId = (id) => document.getElementById(id);
  const AT_ONCE = 60; // tiles
  const STEPS = 1000; // of the slider
  const BINS = 40;
  const OUTCOMES = {
    false: "false alarm",
    miss: "miss",
    found: "found",
    passed: "passed",
    called: "called defective",
    uncalled: "called good",
  };
  const MANY = {
    false: "false alarms",
    miss: "misses",
    found: "defective, found",
    passed: "good, passed",
    called: "called defective",
    uncalled: "called good",
  };

  // Scores and their places on the axis ---------------------------------------------------------------------------

  // As the post-processor normalises: 0.5 is its threshold, far from it scores approach 0 and 1.
  const toPlace = (raw) => {
    if (!data.axis) return raw;
    const x = (2 * (raw - data.axis.middle)) / data.axis.span;
    return 0.5 + x / (1 + Math.abs(x)) / 2;
  };
  const toRaw = (place) => {
    if (!data.axis) return place;
    const x = 2 * place - 1;
    return data.axis.middle + ((data.axis.span / 2) * x) / (1 - Math.abs(x));
  };

  const places = images.map((image) => toPlace(image.raw));
  const bounds = data.threshold === null ? places : [...places, toPlace(data.threshold)];
  const [least, most] = bounds.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  const margin = (most - least || Math.abs(most) || 1) * 0.03;
  const low = data.axis ? Math.max(least - margin, least / 2) : least - margin;
  const high = data.axis ? Math.min(most + margin, (most + 1) / 2) : most + margin;

  const goods = images.filter((image) => image.truth === false);
  const defectives = images.filter((image) => image.truth === true);
  const unknown = images.filter((image) => image.truth === null);
  const highest = (some) => some.reduce((a, image) => Math.max(a, image.raw), -Infinity);
  const start = data.threshold ?? highest(goods.length ? goods : images);
  let threshold = start;

  const outcomeOf = (image) => {
    const called = image.raw > threshold;
    if (image.truth === null) return called ? "called" : "uncalled";
    if (image.truth) return called ? "found" : "miss";
    return called ? "false" : "passed";
  };

  // Words and numbers -----------------------------------------------------------------------------------------------

  const number = (x, digits = 4) => {
    const text = Number(x.toPrecision(digits));
    return Math.abs(text) >= 1e-4 && Math.abs(text) < 1e6 ? String(text) : x === 0 ? "0" : x.toExponential(digits - 1);
  };
  const exact = (x) => String(Number(x.toPrecision(9)));
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  // Wilson's interval: it has a sensible end for 0 of 20, too.
  const interval = (hits, count) => {
    const z = 1.96;
    const share = hits / count;
    const middle = (share + (z * z) / (2 * count)) / (1 + (z * z) / count);
    const half = (z / (1 + (z * z) / count)) * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  };

  const element = (name, properties = {}, children = []) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const drawn = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Round numbers within a range, about as many as asked for.
  const ticks = (from, to, count) => {
    const rough = (to - from) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let k = Math.ceil(from / step); k * step <= to + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
    return found;
  };

  // The histogram ---------------------------------------------------------------------------------------------------

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

  // The ROC curve ---------------------------------------------------------------------------------------------------

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

  // What the threshold costs ----------------------------------------------------------------------------------------

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
      code.textContent = code.dataset.line
        .replaceAll("{threshold}", exact(threshold))
        .replaceAll("{sensitivity}", exact(1 - place))
        .replaceAll("{false_alarms}", found.false);
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

  // Tiles -------------------------------------------------------------------------------------------------------------

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

  // One image, large ----------------------------------------------------------------------------------------------------

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

  // The first look --------------------------------------------------------------------------------------------------------

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
})();
