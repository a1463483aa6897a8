// The feature explorer: a table of all features, and a page for each at #/feature/123, whose details come in a file of
// their own when they are first asked for.
"use strict";

document.addEventListener("DOMContentLoaded", async () => {
  const { sparsemill } = window;
  const { element } = sparsemill;
  const page = sparsemill.feature;
  const list = document.getElementById("list");
  const article = document.getElementById("feature");
  const tip = document.getElementById("tip");
  const title = document.title;
  const detailed = document.body.dataset.detailed === "yes";
  const shardSize = Number(document.body.dataset.shard);
  sparsemill.explorer = ""; // links stay on this page

  const columns = await sparsemill.data("features/columns", true);
  const column = Object.fromEntries(columns.map((one) => [one.name, one]));
  const features = column.feature.values;
  const rowOf = new Map(features.map((feature, row) => [feature, row]));
  const kept = {};
  const data = (name) => (kept[name] ??= sparsemill.data(name));
  const shardOf = (feature) => `features/${String(Math.floor(feature / shardSize)).padStart(4, "0")}`;
  const topToken = (feature) => column.top_token?.values[rowOf.get(feature)] ?? null;

  // ---- the table, its search, and its choice of columns

  const table = sparsemill.table("#table", columns, { height: "100%", initialSort: [{ column: "c0", dir: "asc" }] });
  const count = document.getElementById("count");
  const say = (shown) => {
    const all = features.length.toLocaleString("en-US");
    count.textContent = shown === features.length ? `${all} features` : `${shown.toLocaleString("en-US")} of ${all} features`;
  };
  say(features.length);
  table.on("dataFiltered", (_, rows) => say(rows.length));

  const comparisons = {
    "<": (one, other) => one < other,
    "<=": (one, other) => one <= other,
    ">": (one, other) => one > other,
    ">=": (one, other) => one >= other,
    "=": (one, other) => one === other,
  };
  const texts = columns.map((one, number) => [one, `c${number}`]).filter(([one]) => one.kind === "text");
  function condition(word) {
    const [, name, sign, wanted] = /^([a-z_0-9]+)(<=|>=|<|>|=)(.+)$/i.exec(word) ?? [];
    const number = name ? columns.findIndex((one) => one.name === name) : -1;
    const near = number < 0 && name ? columns.findIndex((one) => one.name.includes(name.toLowerCase())) : number;
    if (near >= 0) {
      const { kind } = columns[near];
      const other = kind === "text" ? wanted : kind === "flag" ? wanted === "yes" : Number(wanted);
      return (row) => row[`c${near}`] !== null && comparisons[sign](row[`c${near}`], other);
    }
    if (/^\d+$/.test(word)) return (row) => row.c0 === Number(word) || texts.some(([, field]) => row[field]?.includes(word));
    const lower = word.toLowerCase();
    return (row) => texts.some(([, field]) => row[field]?.toLowerCase().includes(lower));
  }
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    const wanted = search.value.trim().split(/\s+/).filter(Boolean).map(condition);
    table.setFilter((row) => wanted.every((holds) => holds(row)));
  });

  const choice = document.querySelector("#columns > div");
  columns.forEach((one, number) => {
    if (one.name === "feature") return;
    const box = element("input", [], { type: "checkbox" });
    box.checked = one.shown;
    box.addEventListener("change", () => table.toggleColumn(`c${number}`));
    choice.append(element("label", [box, ` ${one.label}`]));
  });

  // ---- one feature, or all of them

  async function open(feature) {
    const row = rowOf.get(feature);
    list.hidden = true;
    article.hidden = false;
    document.title = `Feature ${feature} · ${title}`;
    const heading = element("h1", `Feature ${feature}`, { tabindex: "-1" });
    if (row === undefined) {
      article.replaceChildren(heading, element("p", "There is no such feature in this report."));
      return;
    }
    const steps = [[features[row - 1], "← ", ""], [features[row + 1], "", " →"]].filter(([one]) => one !== undefined);
    const around = steps.map(([one, before, after]) => page.link(one, `${before}${one}${after}`));
    const body = element("div", [], { class: "details" });
    article.replaceChildren(element("header", [heading, element("nav", around, { "aria-label": "Features beside it" })]), ...page.facts(columns, row), body);
    heading.focus({ preventScroll: true });
    window.scrollTo(0, 0);
    if (!detailed) {
      body.replaceChildren(element("p", "This report was made without the case studies, which give a feature's examples, logits and neighbours: ‘sparsemill analyze’ with --only case_studies makes them.", { class: "note" }));
      return;
    }
    try {
      const [shard, words] = await Promise.all([data(shardOf(feature)), data("features/vocabulary")]);
      if (!heading.isConnected) return; // the reader has gone on
      const details = page.select(shard, words, feature);
      if (!details) {
        body.replaceChildren(element("p", "The case studies were not asked for this feature.", { class: "note" }));
        return;
      }
      body.replaceChildren(element("div", page.texts(details)), element("div", page.side(details, topToken), { class: "side" }));
      if (details.histogram.length) await page.histogram(body.querySelector(".histogram"), details.histogram, feature);
    } catch (error) {
      body.replaceChildren(element("p", error.message, { class: "note" }));
    }
  }

  function close() {
    article.hidden = true;
    list.hidden = false;
    document.title = title;
    table.redraw();
  }

  function route() {
    tip.hidden = true;
    const [, feature] = /^#\/feature\/(\d+)$/.exec(window.location.hash) ?? [];
    if (feature === undefined) close();
    else open(Number(feature));
  }
  window.addEventListener("hashchange", route);
  sparsemill.dark.addEventListener("change", () => article.hidden || route());
  table.on("tableBuilt", route);

  // ---- the value and the effect of the token under the pointer, a finger or the focus

  function point(target) {
    const word = target instanceof Element ? target.closest(".examples .text > span") : null;
    tip.hidden = word === null;
    if (word === null) return;
    const lines = [`activation ${word.dataset.value}`, `effect on the next token’s logit ${word.dataset.effect}`];
    tip.replaceChildren(...lines.map((line) => element("p", line)));
    const box = word.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.bottom + 6 + tip.offsetHeight > window.innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  }
  article.addEventListener("pointerover", (event) => point(event.target));
  article.addEventListener("focusin", (event) => point(event.target));
  article.addEventListener("pointerdown", (event) => point(event.target));
  window.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
  });
});
