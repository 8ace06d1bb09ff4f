/**
 * The strip: what became of every evaluation of a run, on each Slipstream node that takes part in it.
 *
 * A bar is one evaluation, its colour and height say what was done; the line above is the drift. The server sends what
 * is new at most 20 times a second (host/canvas/strip.py), this file draws it at the next frame. A page that comes later asks
 * for the last runs of its workflow, so a reload, a second tab and a workflow opened again show the same.
 */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { speech, translated } from "./words.js"

const ROUTE = "/slipstream/strips"
const NAME = "slipstream_strip"
/** Pixels: the picture (bars below the line), three lines of text, and what the classic canvas leaves around them. */
const PICTURE = 24
const BARS = 12
const HEIGHT = PICTURE + 2 + 3 * 12
const MARGIN = 6
const SVG = "http://www.w3.org/2000/svg"
const MUTED = 2
const BYPASSED = 4

/**
 * How tall an evaluation's bar is at least, of 1, and its colour. Colours are those of Okabe and Ito, which people with
 * any kind of colour vision tell apart, shifted in lightness so that they stand out on dark and on light nodes.
 */
const ACTIONS = {
  computed: [1, "#3a8fd9"],
  anchor: [1, "#009e73"],
  remote: [0.8, "#d55e00"],
  "small model": [0.6, "#b07aa1"],
  forecast: [0.45, "#e69f00"],
  reused: [0.25, "#8f8f45"],
}
const OTHER = [0.6, "#8a8a8a"]
/** What a cache does in the place of the model; every other action is a model that ran. */
const FILLED = ["forecast", "reused"]

const STYLE = `
.slipstream-strip { box-sizing: border-box; height: ${HEIGHT}px; width: 100%; overflow: hidden;
  font: 10px/12px sans-serif; color: var(--input-text, #ddd); user-select: none; }
.slipstream-strip svg { display: block; width: 100%; height: ${PICTURE}px; overflow: visible; border-radius: 2px;
  background: var(--comfy-input-bg, #222); }
.slipstream-strip .hit { fill: transparent; }
.slipstream-strip g:hover .hit { fill: currentColor; fill-opacity: 0.15; }
.slipstream-strip path { fill: none; stroke: currentColor; stroke-width: 1.2px; vector-effect: non-scaling-stroke;
  pointer-events: none; }
.slipstream-strip svg + div { margin-top: 2px; }
.slipstream-strip div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.slipstream-strip div i { display: inline-block; width: 7px; height: 7px; margin: 0 3px 0 0; border-radius: 1px; }
.slipstream-strip div span { margin-right: 7px; }
.slipstream-strip .words { color: var(--descrip-text, #999); }
.slipstream-strip.resting svg { opacity: 0.35; }
`

/** The whole workflow, also while a subgraph is open; older canvases call it `graph`. */
const workflow = () => app.rootGraph ?? app.graph

/** The node that a run calls "12:3": node 3 in the subgraph of node 12. */
function nodeOf(id) {
  let graph = workflow()
  let node
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part)
    graph = node?.subgraph
  }
  return node
}

const percent = (share) => `${(100 * share).toFixed(100 * share < 10 ? 1 : 0)} %`

function seconds(value) {
  if (value < 0.1) return `${(1000 * value).toFixed(1)} ms`
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value / 60)} min`
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e6 ? 2 : 1)} MB`

const plain = (action) => String(action).replaceAll("_", " ")

/** What was done at one evaluation, in a sentence. */
function told(cell, run) {
  const say = speech()
  const drift = cell.drift ?? null
  const reason = say.reasons[cell.reason] ?? translated(say, String(cell.reason ?? ""))
  const action = say.action(plain(cell.action))
  const parts = [
    say.evaluation(cell.index + 1, +(cell.step + 1).toFixed(1), run.steps, action, cell.order),
    ...(cell.share > 0 && cell.share < 1 ? [say.ran(percent(cell.share))] : []),
    seconds(cell.seconds),
    ...(drift === null ? [] : [(FILLED.includes(cell.action) ? say.off : say.avoided)(percent(drift))]),
    ...(reason ? [reason] : []),
  ]
  return parts.join(say.comma)
}

/** Counts, seconds spent and saved, drift and megabytes of a run; estimated as engine/run/account.py does until it ended. */
function summed(run) {
  const cells = run.cells.filter(Boolean)
  const counts = new Map()
  for (const { action } of cells) counts.set(plain(action), (counts.get(plain(action)) ?? 0) + 1)
  if (run.finished) {
    return { counts, spent: run.seconds, saved: run.seconds_saved, drift: run.drift_mean, bytes: run.cache_bytes }
  }
  const total = (list) => list.reduce((sum, cell) => sum + cell.seconds, 0)
  const computed = cells.filter((cell) => !FILLED.includes(cell.action))
  const filled = cells.filter((cell) => FILLED.includes(cell.action))
  const usual = computed.length > 1 ? computed.slice(1) : computed
  const each = usual.length ? total(usual) / usual.length : 0
  const known = filled.filter((cell) => cell.drift != null)
  return {
    counts,
    spent: total(cells),
    saved: filled.reduce((sum, cell) => sum + Math.max(0, each - cell.seconds), 0),
    drift: known.length ? known.reduce((sum, cell) => sum + cell.drift, 0) / known.length : null,
    bytes: run.cache_bytes,
  }
}

function svg(name, attributes, parent) {
  const element = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  parent.append(element)
  return element
}

/** A line's word for an action, with its colour before it: the legend of the bars. */
function sample(action, text) {
  const span = document.createElement("span")
  const colour = document.createElement("i")
  colour.style.background = (ACTIONS[action] ?? OTHER)[1]
  span.append(colour, text)
  return span
}

/** The strip of one node: the runs of one prompt, side by side. */
class Strip {
  constructor(node) {
    this.node = node
    this.runs = []
    this.drawing = false
    this.element = document.createElement("div")
    this.element.className = "slipstream-strip"
    this.picture = svg("svg", { preserveAspectRatio: "none", role: "img" }, this.element)
    this.bars = svg("g", {}, this.picture)
    this.curve = svg("path", {}, this.picture)
    this.lines = ["counts", "numbers", "words"].map((name) => {
      const line = document.createElement("div")
      line.className = name
      this.element.append(line)
      return line
    })
    // Over a DOM widget the classic canvas sees no wheel; the new one finds it by itself.
    this.element.addEventListener("wheel", (event) => {
      if (!globalThis.LiteGraph?.vueNodesMode) app.canvas?.processMouseWheel?.(event)
    })
    const height = () => HEIGHT + 2 * MARGIN
    const widget = node.addDOMWidget(NAME, NAME, this.element, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true,
      margin: MARGIN,
      getHeight: height,
      getMinHeight: height,
      getMaxHeight: height,
    })
    widget.serialize = false
    const [width, tall] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], tall)])
    node.setDirtyCanvas?.(true, true)
  }

  /** Take what a message says of a run. A run of another prompt takes the place of those that are shown. */
  take(message) {
    let run = this.runs.find((known) => known.run === message.run)
    if (!run) {
      const last = this.runs.at(-1)
      if (last && last.prompt_id !== message.prompt_id) {
        if (last.run > message.run) return
        this.clear()
      }
      run = { cells: [], drawn: [] }
      this.runs.push(run)
    }
    const { cells = [], ...rest } = message
    Object.assign(run, rest)
    for (const cell of cells) {
      run.cells[cell.index] = cell
      run.drawn[cell.index]?.remove()
      delete run.drawn[cell.index]
    }
    this.runs.sort((a, b) => a.run - b.run)
    this.redraw()
  }

  clear() {
    this.runs = []
    this.bars.replaceChildren()
  }

  /** Of a prompt, or of all: what has not finished by now never will. */
  stop(prompt) {
    for (const run of this.runs) run.stopped ||= !run.finished && (!prompt || run.prompt_id === prompt)
    this.redraw()
  }

  /** Draw at the next frame, however much comes before it. */
  redraw() {
    if (this.drawing) return
    this.drawing = true
    requestAnimationFrame(() => {
      this.drawing = false
      this.draw()
    })
  }

  draw() {
    let start = 0
    let line = ""
    const largest = Math.max(0, ...this.runs.flatMap(({ cells }) => cells.map((cell) => cell?.drift ?? 0)))
    for (const run of this.runs) {
      let pen = "M"
      if (run.start !== start) {
        // A run before it came later, or grew over its steps.
        for (const bar of run.drawn.splice(0)) bar?.remove()
        run.start = start
      }
      run.cells.forEach((cell, index) => {
        run.drawn[index] ??= this.bar(cell, run, start)
        if (cell.drift == null) return
        const y = BARS - 2 - ((BARS - 4) * cell.drift) / (largest || 1)
        line += `${pen}${start + index + 0.5} ${y.toFixed(2)}`
        pen = "L"
      })
      start += Math.max(run.steps, run.cells.length) + 1
    }
    this.picture.setAttribute("viewBox", `0 0 ${Math.max(1, start - 1)} ${PICTURE}`)
    this.curve.setAttribute("d", line)
    this.write(largest)
  }

  bar(cell, run, start) {
    const [least, fill] = ACTIONS[plain(cell.action)] ?? OTHER
    const height = BARS * (least + (1 - least) * (cell.share > 0 && cell.share < 1 ? cell.share : 0))
    const group = svg("g", { transform: `translate(${start + cell.index} 0)` }, this.bars)
    svg("title", {}, group).textContent = told(cell, run)
    svg("rect", { x: 0, y: 0, width: 1, height: PICTURE, class: "hit" }, group)
    svg("rect", { x: 0.06, y: PICTURE - height, width: 0.88, height, fill }, group)
    return group
  }

  /** The three lines below: what was done how often, what it took, and what was chosen or why nothing was done. */
  write(largest) {
    const run = this.runs.at(-1)
    if (!run) return
    const say = speech()
    const { counts, spent, saved, drift, bytes } = summed(run)
    const place = run.cache_place && run.cache_place !== "cpu" ? run.cache_place : ""
    const list = [...counts].map(([action, count]) => say.count(count, say.action(action)))
    const filled = FILLED.some((action) => counts.has(action))
    const numbers = [
      filled ? `${seconds(spent)}${say.comma}${say.saved(seconds(saved))}` : seconds(spent),
      ...(drift != null ? [say.off(percent(drift))] : []),
      ...(filled && bytes ? [say.cache(megabytes(bytes), place)] : []),
      ...(run.precision ? [say.precision(run.precision)] : []),
    ]
    const resting = this.node.mode === BYPASSED || this.node.mode === MUTED
    const words = [
      ...(resting ? [say.resting] : []),
      ...(run.stopped ? [say.stopped(run.cells.length, run.steps)] : []),
      ...(this.runs.length > 1 ? [say.sampling(this.runs.length)] : []),
      ...(run.words ? [translated(say, run.words)] : []),
    ]
    const texts = [list.join(say.comma), numbers.join(" · "), words.join(" · ")]
    texts.forEach((text, i) => (this.lines[i].textContent = text))
    this.lines[0].replaceChildren(...[...counts.keys()].map((action, i) => sample(action, list[i])))
    const line = largest > 0 ? say.line(percent(largest)) : ""
    for (const element of this.lines) element.title = [...texts, line].filter(Boolean).join("\n")
    const total = Math.max(run.steps, run.cells.length)
    this.picture.setAttribute("aria-label", say.label(total, texts.join(say.stop)))
    this.element.setAttribute("aria-busy", String(!run.finished && !run.stopped))
    this.element.classList.toggle("resting", resting)
  }
}

/** Node objects come and go with their graph; their strips go with them. */
const strips = new WeakMap()
const shown = new Set()

/** Give a message to the strips of its nodes; those of another workflow are not ours, whatever their ids. */
function take(message) {
  if (message.workflow && message.workflow !== workflow()?.id) return
  for (const id of message.nodes ?? []) {
    const node = nodeOf(id)
    if (!node?.addDOMWidget) continue
    let strip = strips.get(node)
    if (!strip) {
      strips.set(node, (strip = new Strip(node)))
      shown.add(new WeakRef(strip))
    }
    strip.take(message)
  }
}

function each(action) {
  for (const reference of shown) {
    const strip = reference.deref()
    if (strip?.node.graph) action(strip)
    else if (!strip) shown.delete(reference)
  }
}

let known

/** Ask for the last runs of the open workflow, and let the server know that this page needs no text beside its strips. */
async function ask() {
  const body = JSON.stringify({ client: (known = api.clientId), workflow: workflow()?.id })
  const headers = { "Content-Type": "application/json" }
  const response = await api.fetchApi(ROUTE, { method: "POST", headers, body })
  if (response.ok) for (const run of (await response.json()).runs) take(run)
}

const refresh = () => ask().catch((error) => console.warn("Slipstream: the strips of earlier runs", error))

app.registerExtension({
  name: "slipstream.strip",

  setup() {
    const style = document.createElement("style")
    style.textContent = STYLE
    document.head.append(style)
    api.addEventListener("slipstream.evaluation", ({ detail }) => take(detail))
    api.addEventListener("slipstream.finished", ({ detail }) => take(detail))
    api.addEventListener("execution_start", () => each((strip) => strip.redraw()))
    for (const end of ["execution_interrupted", "execution_error"]) {
      api.addEventListener(end, ({ detail }) => each((strip) => strip.stop(detail?.prompt_id)))
    }
    // A server that was started again does not know this page.
    api.addEventListener("reconnected", refresh)
    api.addEventListener("status", ({ detail }) => {
      // A page is told only of the ends of its own prompts; where nothing is queued any more, all have ended.
      if (detail?.exec_info?.queue_remaining === 0) each((strip) => strip.stop())
      if (api.clientId && api.clientId !== known) refresh()
    })
  },

  // Also after undo and when another workflow is opened: the nodes are new.
  afterConfigureGraph: refresh,
})
