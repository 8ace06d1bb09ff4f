/** The strip's own words, in the language that the canvas is set to: English, or simplified Chinese. */

import { app } from "../../scripts/app.js"

/**
 * reasons: the run's short ones, for who has not read its source; said: sentences of the server, as pairs for `replace`.
 * What is in neither is said as it is: the choices of a node have no other name on the canvas either.
 */
const ENGLISH = {
  comma: ", ",
  stop: ". ",
  action: (action) => action,
  count: (number, action) => `${number} ${action}`,
  evaluation: (number, step, steps, action, order) =>
    `Evaluation ${number}, step ${step} of ${steps}: ${action}${order ? ` with order ${order}` : ""}`,
  ran: (share) => `${share} of the network ran`,
  off: (drift) => `off by ${drift}`,
  avoided: (drift) => `a forecast would have been off by ${drift}`,
  saved: (time) => `saved ${time}`,
  cache: (size, place) => `cache ${size}${place ? ` (${place})` : ""}`,
  precision: (words) => words,
  resting: "took no part in the last run; this is the one before",
  stopped: (done, steps) => `stopped after ${done} of ${steps}`,
  sampling: (number) => `sampling ${number} of this prompt`,
  line: (drift) => `The line above is the drift, ${drift} at its top.`,
  label: (total, words) => `Slipstream, ${total} evaluations: ${words}`,
  reasons: {
    "first evaluations": "the first are always computed",
    "last step": "the last is always computed",
    "schedule": "not within what may be skipped",
    "within budget": "",
    "max skip": "enough were skipped in a row",
  },
  said: [],
}

const CHINESE_ACTIONS = {
  computed: "计算",
  anchor: "锚点",
  remote: "远程",
  "small model": "小模型",
  forecast: "预测",
  reused: "复用",
}
const CHINESE = {
  comma: "，",
  stop: "。",
  action: (action) => CHINESE_ACTIONS[action] ?? action,
  count: (number, action) => `${action} ${number} 次`,
  evaluation: (number, step, steps, action, order) =>
    `第 ${number} 次评估，第 ${step} 步（共 ${steps} 步）：${action}${order ? `，${order} 阶` : ""}`,
  ran: (share) => `运行了网络的 ${share}`,
  off: (drift) => `偏差 ${drift}`,
  avoided: (drift) => `若用预测则偏差 ${drift}`,
  saved: (time) => `节省 ${time}`,
  cache: (size, place) => `缓存 ${size}${place ? `（${place}）` : ""}`,
  precision: (words) =>
    words.replace(/(\d+) layers in 4 bit, /, "$1 层为 4 bit，").replace(/(\S+) weights in (\S+)/, "$1 权重，$2 计算"),
  resting: "没有参与上一次运行，这里显示更早的一次",
  stopped: (done, steps) => `在第 ${done} 次停止，共 ${steps} 步`,
  sampling: (number) => `这次任务的第 ${number} 次采样`,
  line: (drift) => `上方的折线是偏差，最高处为 ${drift}。`,
  label: (total, words) => `Slipstream，${total} 次评估：${words}`,
  reasons: {
    "first evaluations": "最初几次总会计算",
    "last step": "最后一步总会计算",
    "schedule": "不在可跳过的范围内",
    "within budget": "",
    "max skip": "连续跳过的步数已够多",
    "outside start and end percent": "在开始和结束位置之外",
    "too far ahead for a forecast": "离得太远，无法预测",
    "the active conditioning changed": "生效的条件发生了变化",
  },
  said: [
    [/^nothing (is|was) skipped: /, "没有跳过："],
    ["nothing more is skipped: ", "此后不再跳过："],
    [/at (\d+) steps every one of them counts/, "只有 $1 步时每一步都重要"],
    [/at (\d+) steps one is skipped at most/, "只有 $1 步时最多跳过一步"],
    ["the drift budget is 0", "误差预算为 0"],
    [/(\S+) cannot be served/, "$1 无法加速"],
    ["the sigmas of this run are not a falling schedule", "这次采样的 sigma 不是递减的"],
    [
      "no evaluation was within the drift budget; try the preset Fast, or Custom with a larger drift_budget",
      "没有一次评估在误差预算之内；试试预设 Fast，或用 Custom 并调大 drift_budget",
    ],
    ["too few steps", "步数太少"],
    [/the cache needs (.+) per prompt, more than the budget of (.+)/, "每个提示词的缓存需要 $1，超过预算 $2"],
  ],
}

/** The words to use now; asked for anew each time, for the setting may change while the page is open. */
export const speech = () => (app.extensionManager?.setting?.get("Comfy.Locale") === "zh" ? CHINESE : ENGLISH)

/** A sentence of the server, as far as it is known in these words. */
export const translated = (say, sentence) => say.said.reduce((text, [from, to]) => text.replace(from, to), sentence)
