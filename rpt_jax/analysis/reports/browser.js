// Draws the browser of completions from the JSON in #completion-data; see browser.py.
(() => {
  const data = JSON.parse(document.getElementById("completion-data").textContent);
  const root = document.getElementById("browser");
  const PAGE = 20;
  const rows = data.task.map((task, i) => ({
    task, stage: data.stage[i] ? "evaluation" : "training", step: data.step[i], greedy: data.greedy[i] === 1,
    reward: data.reward[i], prediction: data.prediction[i], cut: data.cut[i] === 1,
    tokens: data.tokens[i], logprobs: data.logprobs[i],
  }));

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  // --- what is shown of a completion ---

  function textOf(row) {
    row.text ??= row.tokens.map((t) => data.pieces[t]).join("");
    return row.text;
  }

  function tokenSpans(row) {
    return row.tokens.map((t, i) => {
      const nats = row.logprobs[i] / 100;
      const isStop = data.pieces[t] === "" && i === row.tokens.length - 1 && !row.cut;
      const span = element("span", isStop ? "stop" : "", isStop ? "■" : data.pieces[t]);
      span.style.background = `rgba(240, 136, 62, ${Math.min(1, nats / 4).toFixed(2)})`;
      span.title = (-nats).toFixed(2) + " nats" + (isStop ? ", stop" : "");
      return span;
    });
  }

  function completionCard(row) {
    const mark = row.reward >= 1 ? "won" : row.reward > 0 ? "partly" : "lost";
    const found = row.prediction === null ? "no prediction" : element("code", "", JSON.stringify(row.prediction));
    const details = [
      ` · reward ${row.reward} · ${row.stage}, step ${row.step}`, row.stage === "evaluation" ? (row.greedy ? ", greedy" : ", sampled") : "",
      row.cut ? " · cut off by the limit" : "",
    ].join("");
    return element("div", "example " + mark, element("p", "thought", ...tokenSpans(row)), element("p", "", found, details));
  }

  function taskHead(number) {
    const task = data.tasks[number];
    const splits = task.splits.map((s) => data.splits[s]).join(", ");
    const truth = element("p", "", "expected ", element("code", "", JSON.stringify(task.truth)), splits ? ` · ${splits}` : "");
    return [element("p", "context", task.context, element("b", "", "▌")), truth];
  }

  // --- controls ---

  const controls = {};
  const bar = element("div", "controls");
  function addSelect(name, label, options) {
    const select = element("select", "");
    select.id = "browse-" + name;
    const box = element("label", "", label + " ", select);
    controls[name] = { select, box };
    setOptions(name, options);
    select.addEventListener("change", () => refresh(true));
    bar.append(box);
  }
  function setOptions(name, options) {
    const { select } = controls[name];
    const old = select.value;
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === old)) select.value = old;
  }
  const valueOf = (name) => controls[name].select.value;

  const evaluated = rows.filter((r) => r.stage === "evaluation");
  const firstStep = Math.min(...evaluated.map((r) => r.step));
  const lastStep = Math.max(...evaluated.map((r) => r.step));
  const views = [];
  if (evaluated.length && firstStep < lastStep) views.push(["pairs", "evaluation, before and after"]);
  if (evaluated.length) views.push(["evaluation", "evaluation"]);
  if (rows.some((r) => r.stage === "training")) views.push(["training", "training"]);
  addSelect("view", "show", views);
  addSelect("step", "step", [["", "all"]]);
  addSelect("split", "split", [["", "every"], ...data.splits.map((name, i) => [String(i), name])]);
  addSelect("style", "style", [["", "both"], ["sampled", "sampled"], ["greedy", "greedy"]]);
  addSelect("reward", "reward", [["", "any"], ["won", "1 or more"], ["partly", "between 0 and 1"], ["lost", "0 or less"]]);
  addSelect("change", "mean reward", [["", "any"], ["rose", "rose"], ["fell", "fell"], ["same", "the same"]]);
  const search = element("input", "");
  search.id = "browse-text";
  search.type = "search";
  search.addEventListener("input", () => refresh(true));
  bar.append(element("label", "", "text ", search));
  const count = element("output", "");
  const list = element("div", "");
  const more = element("button", "", "more");
  more.type = "button";
  more.addEventListener("click", () => { shown += PAGE; refresh(false); });
  const legend = element("p", "", "Shade of a token: its log-probability, from white at 0 to orange at −4 nats or less; hover for the value. ■ is the stop token.");
  root.replaceChildren(bar, legend, count, list, more);

  // --- filters ---

  function passes(row, needle) {
    const split = valueOf("split"), style = valueOf("style");
    if (split !== "" && !data.tasks[row.task].splits.includes(Number(split))) return false;
    if (row.stage === "evaluation" && style && (style === "greedy") !== row.greedy) return false;
    return !needle || textOf(row).toLowerCase().includes(needle);
  }

  function passesReward(row) {
    const wanted = valueOf("reward");
    return !wanted || wanted === (row.reward >= 1 ? "won" : row.reward > 0 ? "partly" : "lost");
  }

  function pairs(needle) {
    const byTask = new Map();
    for (const row of evaluated) {
      if (row.step !== firstStep && row.step !== lastStep) continue;
      const key = data.tasks[row.task].position;
      if (!byTask.has(key)) byTask.set(key, { task: row.task, before: [], after: [] });
      byTask.get(key)[row.step === firstStep ? "before" : "after"].push(row);
    }
    const mean = (of) => of.reduce((sum, r) => sum + r.reward, 0) / of.length;
    const wanted = valueOf("change");
    const found = [];
    for (const pair of byTask.values()) {
      const all = [...pair.before, ...pair.after];
      if (!all.some((r) => passes(r, needle))) continue;
      pair.before = pair.before.filter((r) => passes(r, ""));
      pair.after = pair.after.filter((r) => passes(r, ""));
      if (!pair.before.length || !pair.after.length) continue;
      const change = mean(pair.after) - mean(pair.before);
      if (wanted && wanted !== (change > 0 ? "rose" : change < 0 ? "fell" : "same")) continue;
      found.push(pair);
    }
    return found;
  }

  // --- drawing ---

  let shown = PAGE;
  function drawPairs(needle) {
    const found = pairs(needle);
    count.textContent = `${found.length.toLocaleString("en")} positions`;
    list.replaceChildren(...found.slice(0, shown).map((pair) => {
      const column = (title, of) => element("div", "", element("h4", "", title), ...of.map(completionCard));
      const both = element("div", "pair", column(`before (step ${firstStep})`, pair.before), column(`after (step ${lastStep})`, pair.after));
      return element("section", "position", ...taskHead(pair.task), both);
    }));
    return found.length;
  }

  function drawRows(view, needle) {
    const step = valueOf("step");
    const found = rows.filter((r) => r.stage === view && (!step || r.step === Number(step)) && passesReward(r) && passes(r, needle));
    count.textContent = `${found.length.toLocaleString("en")} completions`;
    list.replaceChildren(...found.slice(0, shown).map((row) => element("section", "position", ...taskHead(row.task), completionCard(row))));
    return found.length;
  }

  function refresh(isNew) {
    if (isNew) shown = PAGE;
    const view = valueOf("view");
    const steps = [...new Set(rows.filter((r) => r.stage === view).map((r) => r.step))].sort((a, b) => a - b);
    setOptions("step", [["", "all"], ...steps.map((s) => [String(s), String(s)])]);
    controls.step.box.hidden = controls.reward.box.hidden = view === "pairs";
    controls.change.box.hidden = view !== "pairs";
    controls.style.box.hidden = view === "training";
    controls.split.box.hidden = view === "training" || !data.splits.length;
    const needle = search.value.toLowerCase();
    const total = view === "pairs" ? drawPairs(needle) : drawRows(view, needle);
    more.hidden = total <= shown;
  }
  refresh(true);
})();
