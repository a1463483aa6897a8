// The front page, and the comparison: draws figures as they come near the screen, makes tables sortable where a reader
// asks for it, and marks the section in view.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const { sparsemill } = window;
  const frames = [...document.querySelectorAll("figure[data-figure]")];
  const drawn = new Set();
  sparsemill.explorer = document.body.dataset.explorer;

  async function draw(frame) {
    const { section, figure: name } = frame.dataset;
    const stored = sparsemill.figures[section]?.[name];
    if (!stored) return;
    const plot = frame.querySelector(".plot");
    const first = !drawn.has(frame);
    drawn.add(frame);
    await sparsemill.draw(plot, stored, `${section}-${name}`);
    if (first && sparsemill.explorer) {
      plot.on("plotly_click", ({ points: [point] }) => {
        if (point.data.hovertemplate?.startsWith("feature %{customdata")) {
          window.location.assign(`${sparsemill.explorer}#/feature/${[point.customdata].flat()[0]}`);
        }
      });
    }
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
  sparsemill.dark.addEventListener("change", redraw);
  sparsemill.narrow.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => frames.filter((frame) => !drawn.has(frame)).forEach(draw));

  // The columns before, token and after as one.
  function withPassages(columns) {
    const parts = ["before", "token", "after"].map((name) => columns.find((column) => column.name === name));
    if (!parts.every(Boolean)) return columns;
    const values = parts[1].values.map((_, row) => JSON.stringify(parts.map((part) => part.values[row] ?? "")));
    const text = { name: "text", label: "text", kind: "passage", values };
    return [...columns.filter((column) => !parts.includes(column)), text];
  }

  async function makeSortable(place) {
    const asked = place.querySelector(".sort");
    asked.firstElementChild.disabled = true;
    const [columns] = await Promise.all([
      sparsemill.data(place.dataset.table),
      sparsemill.script("assets/tabulator.min.js"),
    ]);
    const shown = withPassages(columns);
    const search = sparsemill.element("input", [], { type: "search", placeholder: "search", "aria-label": "Search" });
    const inside = sparsemill.element("div", []);
    place.querySelector(".scroll").replaceWith(search, inside);
    const table = sparsemill.table(inside, shown, shown[0].values.length > 15 ? { height: 480 } : {});
    const count = place.querySelector(".count");
    table.on("dataFiltered", (_, rows) => {
      count.textContent = `${rows.length.toLocaleString("en-US")} of ${shown[0].values.length.toLocaleString("en-US")} rows`;
    });
    search.addEventListener("input", () => {
      const wanted = search.value.toLowerCase();
      table.setFilter((row) => Object.values(row).some((value) => String(value).toLowerCase().includes(wanted)));
    });
    asked.remove();
    search.focus();
  }
  for (const place of document.querySelectorAll(".table[data-table]")) {
    place.querySelector(".sort button").addEventListener("click", () => makeSortable(place));
  }

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
