// What the page of a feature is made of; the explorer puts it there.
"use strict";

{
  const { sparsemill } = window;
  const { element } = sparsemill;
  const show = (value, kind = "number") => sparsemill.show(value, kind);

  const section = (heading, content, note) =>
    element("section", [element("h2", heading), ...(note ? [element("p", note, { class: "note" })] : []), ...[content].flat()]);

  const link = (feature, text = String(feature)) => element("a", text, { href: `#/feature/${feature}` });

  function facts(columns, row) {
    const pair = (one) => {
      const value = one.kind === "text" ? sparsemill.visible(one.values[row]) : show(one.values[row], one.kind);
      const shown = one.kind === "feature" ? link(one.values[row]) : value;
      return element("div", [element("dt", one.label), element("dd", shown, { class: one.kind })]);
    };
    const known = columns.filter((one) => one.name !== "feature" && one.values[row] !== null);
    const parts = [true, false].map((first) =>
      element("dl", known.filter((one) => one.shown === first).map(pair), { class: "known" }),
    );
    if (!parts[1].childElementCount) return [parts[0]];
    return [parts[0], element("details", [element("summary", "All that is known of it"), parts[1]])];
  }

  function example(one, largest) {
    const words = one.tokens.map((text, place) => {
      const activation = one.activations[place];
      const word = element("span", sparsemill.visible(text));
      word.dataset.value = show(activation);
      word.dataset.effect = show(one.effects[place]);
      word.style.setProperty("--share", Math.min(1, activation / largest).toFixed(3));
      if (activation > 0) word.className = "on";
      if (place === one.position - one.first_position) {
        word.classList.add("at");
        word.tabIndex = 0;
      }
      return word;
    });
    const where = `prompt ${one.prompt}, position ${one.position}`;
    const label = [element("b", show(one.activation), { title: where })];
    if (one.quantile !== null) label.push(element("span", ` quantile ${show(one.quantile)}`));
    return element("li", [element("p", label, { class: "value" }), element("p", words, { class: "text" })]);
  }

  const examples = (found, largest) => element("ol", found.map((one) => example(one, largest)), { class: "examples" });

  // Pairs of a name and a value, with bars for the values.
  function bars(rows, name) {
    const largest = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-30);
    const lines = rows.map(([key, value, ...more]) => {
      const bar = element("span", [], { class: value < 0 ? "bar low" : "bar" });
      bar.style.setProperty("--share", (Math.abs(value) / largest).toFixed(3));
      const cells = [element("th", name(key), { scope: "row" }), element("td", bar), element("td", show(value))];
      return element("tr", [...cells, ...more.map((text) => element("td", text))]);
    });
    return element("table", element("tbody", lines), { class: "bars" });
  }

  const token = (text) => element("span", sparsemill.visible(text), { class: "token" });

  // What a shard says of one feature, tokens as words.
  function select(shard, words, feature) {
    if (!shard.studied.feature.includes(feature)) return null;
    const rows = Object.fromEntries(
      Object.entries(shard).map(([table, columns]) => {
        const first = columns.feature.indexOf(feature);
        const count = first < 0 ? 0 : columns.feature.lastIndexOf(feature) - first + 1;
        const names = Object.keys(columns);
        const row = (at) => Object.fromEntries(names.map((name) => [name, columns[name][at]]));
        return [table, Array.from({ length: count }, (_, place) => row(first + place))];
      }),
    );
    const where = (table, column, value) => rows[table].filter((row) => row[column] === value);
    const texts = (kind) =>
      where("examples", "kind", kind).map((row) => ({ ...row, tokens: row.tokens.map((rank) => words[rank]) }));
    const logits = (direction) => where("logits", "direction", direction).map((row) => [words[row.token], row.effect]);
    return {
      top: texts("top"),
      quantile: texts("quantile"),
      histogram: rows.histograms.map((row) => [row.from_activation, row.to_activation, row.count]),
      raised: logits("raised"),
      lowered: logits("lowered"),
      neighbours: rows.neighbours.map((row) => [row.neighbour, row.cosine]),
      neurons: rows.neurons.map((row) => [row.neuron, row.weight, row.share]),
    };
  }

  function neighbours(found, topToken) {
    const rows = found.map(([feature, cosine]) => [feature, cosine, topToken(feature) === null ? "" : token(topToken(feature))]);
    return bars(rows, (feature) => link(feature));
  }

  const neurons = (found) =>
    bars(found.map(([neuron, weight, share]) => [neuron, weight, `${(100 * share).toPrecision(3)} %`]), (neuron) => String(neuron));

  async function histogram(place, found, feature) {
    const plot = element("div", [], { class: "plot", role: "img", "aria-label": `Histogram of activations of feature ${feature}` });
    plot.style.height = "260px";
    place.append(plot);
    await sparsemill.script("assets/plotly.min.js");
    const ends = found.map(([from, to]) => [Math.log10(from || to / 2), Math.log10(to)]);
    const range = [Math.min(...ends.flat()), Math.max(...ends.flat())];
    const decades = Array.from({ length: 20 }, (_, place) => Math.ceil(range[0]) + place).filter((power) => power <= range[1]);
    const ticks = range[1] - range[0] > 1.5 ? decades : decades.flatMap((power) => [power, power + Math.log10(2), power + Math.log10(5)]);
    const stored = {
      data: [
        {
          type: "bar",
          x: ends.map(([from, to]) => (from + to) / 2),
          width: ends.map(([from, to]) => to - from),
          y: found.map(([, , number]) => number),
          customdata: found.map(([from, to]) => `${show(from)} to ${show(to)}`),
          hovertemplate: "activation %{customdata}<br>%{y:,} tokens<extra></extra>",
          marker: { color: "#2b6ca3", line: { width: 0 } },
          opacity: 0.85,
        },
      ],
      layout: {
        height: 260,
        showlegend: false,
        margin: { t: 12 },
        xaxis: {
          title: { text: "activation" },
          tickvals: ticks,
          ticktext: ticks.map((power) => show(10 ** power)),
          range,
        },
        yaxis: { title: { text: "tokens" }, rangemode: "tozero", tickformat: "," },
      },
    };
    if (plot.isConnected) await sparsemill.draw(plot, stored, `feature-${feature}-activations`);
  }

  function texts(details) {
    const shown = [...details.top, ...details.quantile];
    const largest = Math.max(...shown.map((one) => one.activation), 1e-30);
    const found = [];
    if (details.top.length) {
      found.push(section("Where it fires most", examples(details.top, largest), "The stronger the shade, the larger the activation; point at a token for its activation, and for what it adds to the logit of the token that came next."));
    }
    if (details.quantile.length) found.push(section("Over the range of its activations", examples(details.quantile, largest)));
    if (!shown.length) found.push(element("p", "It fired on no token that was looked at.", { class: "note" }));
    return found;
  }

  function side(details, topToken) {
    const found = [];
    if (details.histogram.length) {
      const made = section("Activations", []);
      made.className = "histogram";
      found.push(made);
    }
    if (details.raised.length) found.push(section("Logits raised", bars(details.raised, token)), section("Logits lowered", bars(details.lowered, token)));
    if (details.neighbours.length) found.push(section("Nearest features", neighbours(details.neighbours, topToken), "By cosine of decoders, with the token each fires on most."));
    if (details.neurons.length) found.push(section("Largest neurons", neurons(details.neurons), "Weight in the decoder, and share of its squared norm."));
    return found;
  }

  sparsemill.feature = { link, facts, select, texts, side, histogram };
}
