/**
 * Keeps the profiles that Cache Loaders use inside the workflow, and writes them back where their file is missing.
 *
 * The server does the same for every queued prompt (host/profiles/embedding.py). Here it is done for what never reaches the queue:
 * a workflow that is saved, and the list of profiles on the canvas after one is loaded.
 */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const LOADER = "SlipstreamCacheLoader"
const CALIBRATE = "SlipstreamCalibrate"
const KEY = "slipstream_profiles"
/** What the list of profiles offers beside files. */
const CHOICES = ["none", "auto"]
const ROUTE = "/slipstream/profiles"

/** The whole workflow, also while a subgraph is open; older canvases call it `graph`. */
const workflow = () => app.rootGraph ?? app.graph

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/** Every node of a type, in subgraphs too. */
function nodesOf(type, graph = workflow()) {
  return (graph?.nodes ?? []).flatMap((node) =>
    node.type === type ? [node] : node.subgraph ? nodesOf(type, node.subgraph) : [],
  )
}

/** The Cache Loaders' profile widgets that name a file. */
function chosen() {
  return nodesOf(LOADER)
    .map((node) => widgetOf(node, "profile"))
    .filter((widget) => widget && !CHOICES.includes(widget.value))
}

/** Put a profile's file into the workflow's extra, which the canvas saves, and drop those no node uses any more. */
async function embed(name) {
  const response = CHOICES.includes(name) ? null : await api.fetchApi(`${ROUTE}/${encodeURIComponent(name)}`)
  const data = response?.ok ? (await response.json()).data : undefined
  // Looked up after waiting: another workflow may be open by now.
  const extra = (workflow().extra ??= {})
  const profiles = { ...extra[KEY], ...(data && { [name]: data }) }
  const used = new Set(chosen().map((widget) => widget.value))
  const kept = Object.entries(profiles).filter(([file]) => used.has(file))
  if (kept.length) extra[KEY] = Object.fromEntries(kept)
  else delete extra[KEY]
}

/** Write the profiles of a loaded workflow that are missing here, and let its nodes show the names they got. */
async function restore() {
  const profiles = workflow().extra?.[KEY] ?? {}
  const missing = chosen().filter(({ value, options }) => profiles[value] && !options.values?.includes?.(value))
  const names = new Map()
  for (const name of new Set(missing.map((widget) => widget.value))) {
    const response = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name, data: profiles[name] }),
    })
    const answer = await response.json()
    if (response.ok) names.set(name, answer.name)
    else console.warn(`Slipstream: ${answer.error}`)
  }
  if (!names.size) return
  await app.refreshComboInNodes?.()
  for (const widget of missing.filter(({ value }) => names.has(value))) widget.value = names.get(widget.value)
  for (const [name, file] of names) {
    const data = profiles[name]
    if (name !== file) delete profiles[name]
    profiles[file] = data
  }
}

/** A profile that travels badly must not stop the canvas. */
const report = (error) => console.warn("Slipstream: profiles in the workflow", error)

app.registerExtension({
  name: "slipstream.profiles",

  setup() {
    api.addEventListener("executed", ({ detail }) => {
      // Within subgraphs an id is a path, "12:3".
      const id = String(detail.node).split(":").pop()
      const node = nodesOf(CALIBRATE).find((calibrate) => String(calibrate.id) === id)
      const name = node && widgetOf(node, "name")?.value
      const file = name && (name.endsWith(".safetensors") ? name : `${name}.safetensors`)
      if (chosen().some((widget) => widget.value === file)) embed(file).catch(report)
    })
  },

  nodeCreated(node) {
    const widget = node.comfyClass === LOADER && widgetOf(node, "profile")
    if (!widget) return
    const callback = widget.callback
    widget.callback = function (...values) {
      const result = callback?.apply(this, values)
      embed(widget.value).catch(report)
      return result
    }
  },

  // The canvas waits for this before it takes the loaded workflow as the state to undo to.
  afterConfigureGraph: () => restore().catch(report),
})
