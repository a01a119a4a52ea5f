// The page of a podferry coordinator. It asks the REST API that it comes with, and nobody else. Texts are only ever set as text.

const API = "/api/v1";
const LOOK_EVERY_MS = 3000;
// A browser opens six connections to a server that speaks HTTP/1.1: some have to be left for questions.
const MOST_WATCHES = 3;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const COMMITTED = new Set(["release", "resume", "fill"]);
const HAS_BUDGET = new Set(["auto", "live", "hybrid"]);
const MAY_LOSE = new Set(["auto", "postcopy", "hybrid"]);
const PARTS = [
  ["before", "preparation", ["preflight", "prepare"]],
  ["copy", "copying while it runs", ["precopy"]],
  ["still", "standing still", ["freeze", "dump", "transfer", "restore", "commit", "resume"]],
  ["after", "fetching behind it", ["fill"]],
];

const byId = (id) => document.getElementById(id);
const migrations = new Map();
const watches = new Map();
const running = new Map();
const workloadCards = new Map();
let nodes = [];
let moving = "";
let cancelling = "";

// --- asking

class Refusal extends Error {}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body };
  const answer = await fetch(API + path, options);
  const said = await answer.json();
  if (answer.ok) return said;
  throw new Refusal(said.remedy ? `${said.detail}. What to do: ${said.remedy}.` : `${said.detail}.`);
}

async function look() {
  try {
    const [n, w, m] = await Promise.all([ask("/nodes"), ask("/workloads"), ask("/migrations")]);
    nodes = n.nodes;
    m.migrations.forEach(learn);
    const listed = new Set(m.migrations.map((migration) => migration.id));
    for (const id of migrations.keys()) if (!listed.has(id)) migrations.delete(id);
    showNodes();
    showWorkloads(w.workloads);
    showMigrations();
    say("connection", "connected");
    complain("message", "");
  } catch (error) {
    say("connection", "not connected");
    complain("message", error instanceof Refusal ? error.message : "The coordinator does not answer.");
  }
  setTimeout(look, LOOK_EVERY_MS);
}

// Takes what a list says of a migration, unless a watch has said more of it.
function learn(migration) {
  if (!watches.has(migration.id) || ENDED.has(migration.phase)) migrations.set(migration.id, migration);
  if (!ENDED.has(migration.phase)) watch(migration.id);
}

function watch(id) {
  if (watches.has(id) || watches.size >= MOST_WATCHES) return;
  const source = new EventSource(`${API}/migrations/${id}/watch`);
  const close = () => {
    source.close();
    watches.delete(id);
  };
  watches.set(id, source);
  source.addEventListener("migration", (event) => {
    migrations.set(id, JSON.parse(event.data));
    showMigrations();
    if (event.lastEventId === "end") close();
  });
  // The next look begins another.
  source.addEventListener("problem", close);
  source.addEventListener("error", close);
}

// --- showing

function make(name, className, text, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function complain(id, text) {
  say(id, text);
  byId(id).hidden = text === "";
}

// What has not changed stays, so that nobody loses the place that they read or have the focus at.
function replace(element, key, children) {
  const version = JSON.stringify(key);
  if (element.dataset.version === version) return;
  element.dataset.version = version;
  element.replaceChildren(...children());
}

const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count < 1 ? 0 : Math.min(Math.floor(Math.log2(count) / 10), units.length - 1);
  return `${(count / 1024 ** power).toFixed(power === 0 ? 0 : 1)} ${units[power]}`;
};
const time = (ms) => (ms < 10000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);
const rate = (count, ms) => (ms > 0 ? `${bytes((count * 1000) / ms)}/s` : "");

function strategiesOf(node) {
  const has = (feature) => node.features.includes(feature);
  const strategies = [];
  if (has("agent:cold")) strategies.push("cold");
  if (node.fit) strategies.push("warm");
  if (node.fit && has("kernel:write_tracking")) strategies.push("live");
  if (node.fit && has("agent:post_copy")) strategies.push("postcopy");
  return strategies;
}

function showNodes() {
  replace(byId("nodes"), nodes, () => {
    const cards = nodes.map((node) => {
      const state = node.fit ? "fit" : node.reachable ? "not fit" : "not reachable";
      const head = make("div", "row", undefined, make("h3", "", node.name), make("span", node.fit ? "good" : "bad", state));
      const card = make("article", "card", undefined, head, make("div", "soft", node.address));
      if (node.reachable) {
        const memory = `${bytes(node.memory_available)} of ${bytes(node.memory_total)} free`;
        card.append(make("div", "", memory));
        card.append(make("div", "soft", `${node.architecture}, Linux ${node.kernel}, CRIU ${node.criu_version}`));
        card.append(make("div", "tags", undefined, ...strategiesOf(node).map((name) => make("span", "", name))));
      }
      node.complaints.forEach((complaint) => card.append(make("div", "bad", complaint)));
      return card;
    });
    return [cards.length ? make("div", "grid", undefined, ...cards) : make("p", "empty", "The inventory names none.")];
  });
}

function showWorkloads(workloads) {
  const box = byId("workloads");
  const grid = box.querySelector(".grid") ?? make("div", "grid");
  const known = new Set(workloads.map((workload) => workload.name));
  for (const [name, card] of workloadCards) {
    if (known.has(name)) continue;
    card.box.remove();
    workloadCards.delete(name);
  }
  for (const workload of workloads) {
    if (!workloadCards.has(workload.name)) grid.append(workloadCard(workload.name).box);
    const { where, facts, button } = workloadCards.get(workload.name);
    where.textContent = workload.node ? `${workload.status} on ${workload.node}` : workload.status;
    where.className = workload.status === "running" ? "good" : "bad";
    facts.textContent = workload.node
      ? `${bytes(workload.memory_bytes)}, ${workload.processes} processes, ${workload.addresses.join(" ")}`
      : "";
    button.disabled = !workload.node || workload.migration_id !== "";
    button.dataset.node = workload.node;
  }
  if (!grid.isConnected) box.replaceChildren(grid);
}

function workloadCard(name) {
  const card = { where: make("span"), facts: make("div", "soft"), button: make("button", "", "Move…") };
  card.button.setAttribute("aria-label", `Move ${name}`);
  card.button.addEventListener("click", () => openMove(name, card.button.dataset.node));
  const head = make("div", "row", undefined, make("h3", "", name), card.where);
  card.box = make("article", "card", undefined, head, card.facts, card.button);
  card.box.dataset.workload = name;
  workloadCards.set(name, card);
  return card;
}

function showMigrations() {
  const all = [...migrations.values()].sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
  showRunning(all.filter((migration) => !ENDED.has(migration.phase)));
  const past = all.filter((migration) => ENDED.has(migration.phase));
  replace(byId("past"), past, () => (past.length ? past.map(pastEntry) : [make("li", "empty", "There are none.")]));
}

function showRunning(active) {
  const box = byId("running");
  const ids = new Set(active.map((migration) => migration.id));
  for (const [id, card] of running) {
    if (ids.has(id)) continue;
    // Whoever had the focus on what goes now is not sent back to the beginning of the page.
    if (card.box.contains(document.activeElement)) box.focus();
    card.box.remove();
    running.delete(id);
  }
  for (const migration of active) {
    if (!running.has(migration.id)) box.append(runningCard(migration).box);
    update(running.get(migration.id), migration);
  }
  const empty = box.querySelector(".empty");
  if (active.length) empty?.remove();
  else if (!empty) box.append(make("p", "empty", "Nothing is being moved."));
}

const title = (migration) => `${migration.workload}: ${migration.source} → ${migration.target}`;

function runningCard(migration) {
  const card = {
    phase: make("strong"),
    figures: make("div", "soft"),
    progress: make("progress"),
    rounds: make("div", "scroll"),
    button: make("button", "", "Cancel…"),
    last: { bytes: 0, at: 0, text: "" },
  };
  card.progress.setAttribute("aria-label", `How far ${migration.workload} is`);
  card.button.setAttribute("aria-label", `Cancel the migration of ${migration.workload}`);
  card.button.addEventListener("click", () => openCancel(migration.id, title(migration)));
  const head = make("div", "row", undefined, make("h3", "", title(migration)), card.phase);
  card.box = make("article", "card", undefined, head, card.progress, card.figures, card.rounds, card.button);
  card.box.dataset.migration = migration.id;
  running.set(migration.id, card);
  return card;
}

function update(card, migration) {
  card.phase.textContent = migration.phase.replace("_", " ");
  card.button.disabled = COMMITTED.has(migration.phase) || migration.phase === "rolling_back";
  const { raw_bytes: sent, expected_bytes: expected } = migration.progress;
  if (expected > 0 && sent > 0) {
    card.progress.max = expected;
    card.progress.value = Math.min(sent, expected);
  } else {
    card.progress.removeAttribute("value");
  }
  const last = migration.rounds.at(-1);
  const parts = [migration.strategy || "to be chosen"];
  if (sent > 0) parts.push(`${bytes(sent)} of ${bytes(Math.max(sent, expected))}`);
  if (last && migration.phase === "precopy") {
    parts.push(rate(last.raw_bytes, last.duration_ms), `a freeze would add ${time(last.predicted_ms)}`);
  } else if (sent > 0) {
    parts.push(transferRate(card, sent));
  }
  if (migration.downtime_ms > 0) parts.push(`stood still for ${time(migration.downtime_ms)}`);
  card.figures.textContent = parts.filter(Boolean).join(" · ");
  replace(card.rounds, migration.rounds, () => (migration.rounds.length ? [roundTable(migration.rounds)] : []));
}

function transferRate(card, sent) {
  const now = performance.now();
  if (now - card.last.at > 500 && sent > card.last.bytes) {
    const text = card.last.at > 0 ? rate(sent - card.last.bytes, now - card.last.at) : "";
    card.last = { bytes: sent, at: now, text };
  }
  return card.last.text;
}

function roundTable(rounds) {
  const cells = (name, words) => make("tr", "", undefined, ...words.map((word) => make(name, "", word)));
  const head = cells("th", ["round", "memory and files", "on the wire", "took", "written, pages/s", "a freeze would add"]);
  head.querySelectorAll("th").forEach((cell) => cell.setAttribute("scope", "col"));
  const rows = rounds.map((round, index) =>
    cells("td", [
      String(index + 1),
      bytes(round.raw_bytes),
      bytes(round.wire_bytes),
      time(round.duration_ms),
      Math.round(round.dirty_rate).toLocaleString("en"),
      time(round.predicted_ms),
    ]),
  );
  const table = make("table", "", undefined, make("thead", "", undefined, head), make("tbody", "", undefined, ...rows));
  table.setAttribute("aria-label", "Rounds");
  return table;
}

function pastEntry(migration) {
  const lost = migration.phase === "failed" && migration.decision === "commit";
  const outcome = make("strong", migration.phase === "succeeded" ? "good" : "bad", lost ? "lost" : migration.phase);
  const head = make("div", "row", undefined, make("h3", "", title(migration)), outcome);
  const when = new Date(migration.created_at).toLocaleString();
  const figures = [when, migration.strategy || "not chosen", `${time(migration.total_ms)} in all`];
  if (migration.phase === "succeeded") figures.push(`${time(migration.downtime_ms)} down`, bytes(migration.wire_bytes));
  const entry = make("li", "", undefined, head, bar(migration), make("div", "soft", figures.join(" · ")));
  if (migration.reason) entry.append(make("div", "bad", migration.reason));
  if (migration.strategy_reason) entry.append(make("div", "soft", migration.strategy_reason));
  migration.notes.forEach((note) => entry.append(make("div", "soft", note)));
  entry.dataset.migration = migration.id;
  return entry;
}

function bar(migration) {
  const box = make("div", "bar");
  const words = [];
  for (const [name, label, timings] of PARTS) {
    const ms = timings.reduce((sum, timing) => sum + migration.timings[timing], 0);
    if (ms <= 0) continue;
    const part = make("span", name);
    part.style.flexGrow = ms;
    part.title = `${label}: ${time(ms)}`;
    words.push(part.title);
    box.append(part);
  }
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", words.join(", ") || "no time was taken");
  return box;
}

// --- starting and cancelling

function openMove(workload, node) {
  moving = workload;
  say("move-title", `Move ${workload}`);
  const others = nodes.filter((other) => other.name !== node);
  const options = others.map((other) => new Option(other.fit ? other.name : `${other.name} (not fit)`, other.name));
  byId("move-target").replaceChildren(new Option("the best one", ""), ...options);
  complain("move-error", "");
  byId("move-loss").checked = false;
  adaptMove();
  byId("move").showModal();
}

// Shows what goes with the strategy.
function adaptMove() {
  const strategy = byId("move-strategy").value;
  byId("move-budget-label").hidden = !HAS_BUDGET.has(strategy);
  byId("move-loss-label").hidden = !MAY_LOSE.has(strategy);
  byId("move-note").hidden = strategy !== "cold";
}

function wishes() {
  const strategy = byId("move-strategy").value;
  const wanted = { workload: moving, target: byId("move-target").value, strategy };
  const budget = byId("move-budget").valueAsNumber;
  if (HAS_BUDGET.has(strategy) && budget > 0) wanted.downtime_budget_ms = budget;
  if (MAY_LOSE.has(strategy)) wanted.accept_loss = byId("move-loss").checked;
  return wanted;
}

function openCancel(id, words) {
  cancelling = id;
  say("cancel-title", `Cancel ${words}`);
  complain("cancel-error", "");
  byId("cancel").showModal();
}

// Sends what a dialog is for; it closes when that was accepted, and says why when not.
function onSubmit(name, send) {
  byId(`${name}-close`).addEventListener("click", () => byId(name).close());
  byId(`${name}-form`).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = byId(`${name}-start`);
    button.disabled = true;
    try {
      learn(await send());
      byId(name).close();
      showMigrations();
    } catch (error) {
      complain(`${name}-error`, error instanceof Refusal ? error.message : "The coordinator does not answer.");
    }
    button.disabled = false;
  });
}

onSubmit("move", () => ask("/migrations", JSON.stringify(wishes())));
onSubmit("cancel", () => ask(`/migrations/${cancelling}/cancel`, ""));
byId("move-strategy").addEventListener("change", adaptMove);
byId("legend").append(...PARTS.map(([name, label]) => make("span", "", undefined, make("i", name), label)));
look();
