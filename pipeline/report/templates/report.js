// Draws the figures as they come near the screen, in the colours the reader prefers, and marks the section in view.
"use strict";

window.sparsemill = {
  figures: {},
  themes: {},
  darkOf: {},
  add(section, figures) {
    this.figures[section] = figures;
  },
};

document.addEventListener("DOMContentLoaded", () => {
  const { figures, themes, darkOf } = window.sparsemill;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 44rem)");
  const touch = window.matchMedia("(pointer: coarse)");
  const frames = [...document.querySelectorAll("figure[data-figure]")];
  const drawn = new Set();

  // A copy of a stored figure, each light colour replaced by its dark partner where the page is dark.
  function copy(value) {
    if (typeof value === "string") return dark.matches && Object.hasOwn(darkOf, value) ? darkOf[value] : value;
    if (Array.isArray(value)) return value.map(copy);
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, copy(item)]));
    }
    return value;
  }

  function draw(frame) {
    const { section, figure: name } = frame.dataset;
    const stored = figures[section] && figures[section][name];
    if (!stored) return;
    const { data, layout } = copy(stored);
    layout.template = themes[dark.matches ? "dark" : "light"];
    layout.autosize = true;
    if (touch.matches && !layout.scene) layout.dragmode = false; // a finger scrolls the page
    if (narrow.matches) layout.margin = { l: 48, r: 8, t: 40, b: 48, ...layout.margin };
    window.Plotly.react(frame.querySelector(".plot"), data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch.matches ? false : "hover",
      modeBarButtons: [layout.scene ? ["toImage", "resetCameraDefault3d"] : ["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { format: "svg", filename: `${section}-${name}` },
    });
    drawn.add(frame);
  }

  const nearby = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          nearby.unobserve(entry.target);
          draw(entry.target);
        }
      }
    },
    { rootMargin: "800px 0px" },
  );
  frames.forEach((frame) => nearby.observe(frame));
  const redraw = () => drawn.forEach(draw);
  dark.addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => frames.filter((frame) => !drawn.has(frame)).forEach(draw));

  const links = new Map([...document.querySelectorAll("nav li a")].map((link) => [link.hash.slice(1), link]));
  const current = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  document.querySelectorAll("main > section[id]").forEach((section) => current.observe(section));
});
