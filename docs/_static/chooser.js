// The plot of solvers: error or distance by network calls, with the ranking at the number of calls that is chosen.
// Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
document.addEventListener("DOMContentLoaded", () => {
  const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7f00"];
  const DASHES = ["", "7 3", "2 3"];
  const USUAL = ["auto", "DDIM", "DPM-Solver++ 2M", "UniPC 2", "gDDIM 2", "heun", "the best of diffusers"];
  const show = (x) => (x >= 1e-5 ? Number(x.toPrecision(2)).toFixed(Math.max(0, 1 - Math.floor(Math.log10(x)))).replace(/(\..*?)0+$/, "$1").replace(/\.$/, "") : x.toExponential(0));

  const element = (name, attributes = {}, ...children) => {
    const svg = ["svg", "g", "path", "circle", "text", "line", "title", "rect"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const start = (root) => {
    const sets = JSON.parse(root.querySelector("script").textContent);
    const pick = element("select", { "aria-label": "Diffusion and network" }, ...sets.map((s, i) => element("option", { value: i }, s.title)));
    const slider = element("input", { type: "range", min: 0, step: 1, "aria-label": "Network calls" });
    const said = element("output");
    const plot = element("div", { class: "chooser-plot" });
    const names = element("div", { class: "chooser-names" });
    const table = element("table", { class: "chooser-table" });
    root.append(
      element("div", { class: "chooser-controls" }, element("label", {}, "Diffusion ", pick), element("label", {}, "Network calls ", slider, said)),
      plot, names, element("div", { class: "table-wrapper" }, table),
    );
    let chosen, calls, on;

    const value = (line) => {  // the best with no more calls than the budget
      const affordable = line.points.filter(([n]) => n <= calls + 0.5);
      return affordable.length ? affordable[affordable.length - 1] : null;
    };
    const colour = (i) => COLOURS[i % COLOURS.length];
    const dash = (i) => DASHES[Math.floor(i / COLOURS.length) % DASHES.length];

    const draw = () => {
      const width = Math.max(300, plot.clientWidth), height = Math.round(Math.min(420, 140 + width * 0.4));
      const narrow = width < 520, left = 52, right = narrow ? 12 : 150, top = 12, bottom = 42;
      const lines = chosen.lines.map((line, i) => ({ ...line, i })).filter((line) => on.has(line.name));
      const points = lines.flatMap((line) => line.points);
      const all = chosen.lines.flatMap((line) => line.points.map(([n]) => n));
      const logs = points.map(([, y]) => Math.log10(y));
      const [low, high] = [Math.floor(Math.min(...logs, 0)), Math.ceil(Math.max(...logs, -1))];
      const [few, many] = [Math.log(Math.min(...all)), Math.log(Math.max(...all))];
      const x = (n) => left + ((Math.log(n) - few) / (many - few)) * (width - left - right);
      const y = (v) => top + ((high - Math.log10(v)) / (high - low)) * (height - top - bottom);
      const svg = element("svg", { width, height, role: "img", "aria-label": `${chosen.measure} by network calls, ${chosen.title}` });
      for (let power = low; power <= high; power++) {
        svg.append(element("line", { class: "rule", x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }));
        svg.append(element("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, show(10 ** power)));
      }
      for (const n of chosen.ticks) svg.append(element("text", { x: x(n), y: height - bottom + 18, "text-anchor": "middle" }, String(n)));
      svg.append(element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "network calls per image"));
      svg.append(element("line", { class: "now", x1: x(calls), x2: x(calls), y1: top, y2: height - bottom }));
      const labels = [];
      for (const line of lines) {
        const path = line.points.map(([n, v], k) => `${k ? "L" : "M"}${x(n)},${y(v)}`).join("");
        svg.append(element("path", { d: path, stroke: colour(line.i), "stroke-dasharray": dash(line.i), class: line.name === "auto" ? "line ours" : "line" }));
        for (const [n, v, settings] of line.points)
          svg.append(element("circle", { cx: x(n), cy: y(v), r: 4, fill: colour(line.i) }, element("title", {}, `${line.name}${settings ? ` (${settings})` : ""}: ${show(v)} with ${Math.round(n)} calls`)));
        const end = line.points[line.points.length - 1];
        labels.push({ name: line.name, i: line.i, x: x(end[0]) + 8, y: y(end[1]) + 4 });
      }
      if (!narrow) {  // names at the ends of lines, moved apart where they would touch
        labels.sort((a, b) => a.y - b.y);
        for (let k = 1; k < labels.length; k++) labels[k].y = Math.max(labels[k].y, labels[k - 1].y + 15);
        const over = labels.length ? labels[labels.length - 1].y - (height - bottom) : 0;
        for (const label of labels) svg.append(element("text", { x: width - right + 8, y: label.y - Math.max(0, over), fill: colour(label.i), class: "name" }, label.name));
      }
      plot.replaceChildren(element("p", { class: "chooser-measure" }, `${chosen.measure}; ${chosen.less}`), svg);

      said.textContent = ` ${calls}`;
      names.replaceChildren(...chosen.lines.map((line, i) => {
        const box = element("input", { type: "checkbox" });
        box.checked = on.has(line.name);
        box.addEventListener("change", () => { box.checked ? on.add(line.name) : on.delete(line.name); draw(); });
        return element("label", { style: `--colour: ${colour(i)}` }, box, element("span", {}, line.name));
      }));
      const ranked = chosen.lines.map((line) => ({ line, best: value(line) })).filter((one) => one.best).sort((a, b) => a.best[1] - b.best[1]);
      const settings = ranked.some((one) => one.best[2]);
      table.replaceChildren(
        element("thead", {}, element("tr", {}, ...[`With at most ${calls} calls`, "value", ...(settings ? ["best settings"] : [])].map((t) => element("th", {}, t)))),
        element("tbody", {}, ...ranked.map(({ line, best }) => element("tr", { class: line.name === "auto" ? "ours" : "" },
          ...[line.name, show(best[1]), ...(settings ? [best[2] || ""] : [])].map((t) => element("td", {}, t))))),
      );
    };
    const choose = () => {
      chosen = sets[pick.value];
      const rank = (line) => (USUAL.indexOf(line.name) + USUAL.length + 1) % (USUAL.length + 1);  // usual ones have colours of their own
      chosen.lines.sort((a, b) => rank(a) - rank(b));
      const counts = [...new Set(chosen.lines.flatMap((line) => line.points.map(([n]) => Math.round(n))))].sort((a, b) => a - b);
      chosen.ticks = [5, 10, 20, 30, 50, 100].filter((n) => n >= counts[0] && n <= counts[counts.length - 1]);
      slider.max = counts.length - 1;
      slider.value = Math.max(0, counts.indexOf(10));
      const usual = chosen.lines.map((line) => line.name).filter((name) => USUAL.includes(name));
      on = new Set(usual.length > 2 ? usual : chosen.lines.map((line) => line.name));
      const move = () => { calls = counts[slider.value]; draw(); };
      slider.oninput = move;
      move();
    };
    pick.addEventListener("change", choose);
    new ResizeObserver(() => draw()).observe(root);
    choose();
  };
  document.querySelectorAll(".chooser").forEach(start);
});
