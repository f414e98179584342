// Where the runs come from: TensorBoard, which may get new events, or the page itself.

const SPELLED = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };

// The report's data stand in the page as JSON; without them the plugin's routes are asked.
export function findSource() {
  const embedded = document.getElementById("rankflow-data");
  return embedded === null ? served() : inPage(JSON.parse(embedded.textContent));
}

function served() {
  const ask = async (route, pairs) => {
    const answer = await fetch(`${route}?${new URLSearchParams(pairs)}`).catch(() => null);
    if (answer === null) throw new Error("TensorBoard does not answer.");
    const failed = { error: `TensorBoard failed with status ${answer.status}.` };
    const value = await answer.json().catch(() => failed);
    if (!answer.ok) throw new Error(value.error);
    return value;
  };
  return {
    grows: true,
    runs: async () => (await ask("runs", [])).runs,
    events: async (run, from) => restore(await ask("events", [["run", run], ["from", from]])),
    layout: (runs) => ask("layout", runs.map((run) => ["run", run])),
  };
}

function inPage(data) {
  const find = (name) => data.runs.find((run) => run.name === name);
  return {
    grows: false,
    runs: async () => data.runs.map(({ name, events }) => ({ name, events: events.length })),
    events: async (run) => restore(find(run)),
    layout: async () => data.layout,
  };
}

// JSON cannot spell every number: some come as strings.
function restore(view) {
  for (const event of view.events) {
    for (const column of [event.importance, event.magnitude_change]) {
      for (let i = 0; i < column.length; i++) {
        if (typeof column[i] === "string") column[i] = SPELLED[column[i]];
      }
    }
  }
  return view;
}
