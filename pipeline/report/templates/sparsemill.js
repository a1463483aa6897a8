// What the report's pages share: data files, figures in the reader's colours, and tables to sort and search.
// Text of a corpus is set as text content, never as markup.
"use strict";

window.sparsemill = {
  figures: {},
  themes: {},
  darkOf: {},
  dark: window.matchMedia("(prefers-color-scheme: dark)"),
  narrow: window.matchMedia("(max-width: 44rem)"),
  touch: window.matchMedia("(pointer: coarse)"),
  waiting: {},
  early: {},
  scripts: {},

  // Called by the files of figures, and by data files.
  add(section, figures) {
    this.figures[section] = figures;
  },
  receive(name, packed) {
    if (Object.hasOwn(this.waiting, name)) this.waiting[name](packed);
    else this.early[name] = packed;
  },

  // Loads a script once.
  script(source) {
    this.scripts[source] ??= new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = source;
      element.onload = () => resolve();
      element.onerror = () => reject(new Error(`${source} is missing from this folder`));
      document.head.append(element);
    });
    return this.scripts[source];
  },

  // The value of a data file; ones with a script tag of their own have come, or will.
  async data(name, tagged = false) {
    const packed = await new Promise((resolve, reject) => {
      if (Object.hasOwn(this.early, name)) resolve(this.early[name]);
      this.waiting[name] = resolve;
      if (!tagged) this.script(`${name}.js`).catch(reject);
    });
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  },

  // A number, a flag or a text as people read it.
  show(value, kind) {
    if (value === null || value === undefined) return "–";
    if (kind === "flag") return value ? "yes" : "no";
    if (kind === "integer") return value.toLocaleString("en-US");
    if (kind !== "number") return String(value);
    const size = Math.abs(value);
    const text =
      size >= 1000
        ? value.toLocaleString("en-US", { maximumFractionDigits: 0 })
        : size !== 0 && size < 1e-4
          ? value.toExponential(2)
          : String(Number(value.toPrecision(4)));
    return text.replaceAll("-", "−");
  },

  element(tag, content, attributes = {}) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...[content].flat());
    return made;
  },

  // A copy of a stored figure, each light colour replaced by its dark partner where the page is dark.
  coloured(value) {
    if (typeof value === "string") {
      return this.dark.matches && Object.hasOwn(this.darkOf, value) ? this.darkOf[value] : value;
    }
    if (Array.isArray(value)) return value.map((item) => this.coloured(item));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, this.coloured(item)]));
    }
    return value;
  },

  draw(plot, stored, filename) {
    const { data, layout } = this.coloured(stored);
    layout.template = this.themes[this.dark.matches ? "dark" : "light"];
    layout.autosize = true;
    if (this.touch.matches && !layout.scene) layout.dragmode = false; // a finger scrolls the page
    if (this.narrow.matches) layout.margin = { l: 48, r: 8, t: 40, b: 48, ...layout.margin };
    return window.Plotly.react(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: this.touch.matches ? false : "hover",
      modeBarButtons: [layout.scene ? ["toImage", "resetCameraDefault3d"] : ["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { format: "svg", filename },
    });
  },

  // A table of columns {name, label, kind, values}: a heading sorts, only the rows in view are drawn.
  table(place, columns, options = {}) {
    const rows = Array.from({ length: columns.length ? columns[0].values.length : 0 }, (_, row) =>
      Object.fromEntries(columns.map((column, number) => [`c${number}`, column.values[row]])),
    );
    return new window.Tabulator(place, {
      data: rows,
      layout: "fitDataFill",
      columnDefaults: { headerWordWrap: true, resizable: false },
      columns: columns.map((column, number) => this.column(column, `c${number}`)),
      placeholder: () => this.element("p", "No row answers to the search."),
      ...options,
    });
  },
  column(column, field) {
    const ranked = ["integer", "number", "flag"].includes(column.kind);
    const right = column.kind !== "text" && column.kind !== "passage";
    return {
      field,
      title: column.name,
      titleFormatter: () => this.element("button", column.label, { type: "button" }),
      visible: column.shown !== false,
      frozen: column.name === "feature",
      cssClass: column.kind,
      hozAlign: right ? "right" : "left",
      headerHozAlign: right ? "right" : "left",
      sorter: right ? "number" : "string",
      sorterParams: { alignEmptyValues: "bottom" },
      headerSortStartingDir: ranked ? "desc" : "asc",
      width: { passage: 560, text: 150, feature: 84 }[column.kind] ?? 112,
      formatter: (cell) => this.cell(cell.getValue(), column.kind),
    };
  },
  cell(value, kind) {
    if (kind === "feature" && value !== null && this.explorer !== undefined) {
      return this.element("a", String(value), { href: `${this.explorer}#/feature/${value}` });
    }
    if (kind === "text" && value !== null) return this.element("span", this.visible(value), { class: "token" });
    if (kind !== "passage") return document.createTextNode(this.show(value, kind));
    const [before, token, after] = JSON.parse(value);
    return this.element("span", [before, this.element("mark", token), after], { class: "passage" });
  },

  // White space that a reader would not see otherwise.
  visible(text) {
    return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";
  },
};
