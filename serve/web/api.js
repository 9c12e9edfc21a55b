// Calling the endpoint: keys, waiting where it is busy, errors in words, and streams.

import { askForKey, storedKey } from "./key.js";

/** Seconds that a call waits for a busy server, all tries together. */
const PATIENCE_S = 60;

const TITLES = {
  authentication_error: "You are not let in.",
  conflict_error: "That does not fit together.",
  invalid_request_error: "Something needs changing.",
  not_found_error: "It is not there any more.",
  rate_limit_error: "The booth is full.",
  server_error: "The server had trouble.",
  timeout_error: "It took too long.",
};

/** What went wrong, as a person may read it. */
export class Problem extends Error {
  constructor(title, message, { status = 0, code = "", param = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { title, status, code, param, requestId, retryAfter });
  }
}

/**
 * The response to a call that succeeded; any other throws a Problem. A server that is busy or warming up is asked again
 * when it said, and `onWait(seconds, problem)` hears how long that is.
 */
export async function call(path, { onWait = () => {}, ...options } = {}) {
  let waited = 0;
  for (;;) {
    const response = await send(path, options);
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (problem.code === "invalid_api_key") {
      if (!(await askForKey())) throw problem;
    } else if (problem.retryAfter !== null && waited < PATIENCE_S) {
      waited += problem.retryAfter;
      await countDown(problem, onWait, options.signal);
    } else {
      throw problem;
    }
  }
}

/** The events of a stream, each its JSON; throws a Problem where one is an error. */
export async function* events(response) {
  let text = "";
  for await (const piece of decoded(response.body)) {
    const blocks = (text + piece).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = JSON.parse(dataOf(block));
      if (event.error) throw problemOfError(event.error, 0, response);
      yield event;
    }
  }
}

async function* decoded(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice("data:".length)).join("\n");
}

async function send(path, { headers = {}, ...options }) {
  const key = storedKey();
  try {
    return await fetch(path, { ...options, headers: key ? { ...headers, Authorization: `Bearer ${key}` } : headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer.", "Check that it runs and that you are connected, then try again.");
  }
}

async function problemOf(response) {
  const body = await response.json().catch(() => null);
  return problemOfError(body?.error ?? {}, response.status, response);
}

function problemOfError({ message, type, code, param }, status, response) {
  return new Problem(TITLES[type] ?? "That did not work.", message ?? "The server gave no reason; try again.", {
    status,
    code,
    param,
    requestId: response.headers.get("X-Request-ID"),
    retryAfter: [429, 503].includes(status) ? Number(response.headers.get("Retry-After")) || 2 : null,
  });
}

async function countDown(problem, onWait, signal) {
  for (let left = problem.retryAfter; left > 0; left -= 1) {
    onWait(left, problem);
    await pause(1000, signal);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
