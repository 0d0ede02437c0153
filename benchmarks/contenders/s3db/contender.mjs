// s3db.js's S3QueuePlugin: the same task and the same answer as benchmarks/contenders/__main__.py, in JavaScript.
// Run it in the folder where package.json was installed: node contender.mjs TASK

import { S3db } from "s3db.js/lite";
import { S3QueuePlugin } from "s3db.js/plugins/s3-queue.plugin";

const DIGITS = 8;
const PATIENCE_MS = 20_000;
const GRACE_MS = 1000;
const IN_FLIGHT = 32;
const WARM = 3;
const PAUSE_MS = 50;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const payloads = (count, size) =>
  Array.from({ length: count }, (_, n) => String(n).padStart(DIGITS, "0").padEnd(size, "x"));

async function inFlight(items, call, most) {
  const waiting = items[Symbol.iterator]();
  const run = async () => {
    for (const item of waiting) await call(item);
  };
  await Promise.all(Array.from({ length: Math.min(most, items.length) }, run));
}

async function open({ place, options }) {
  const url = new URL(place.endpoint_url);
  const credentials = `${encodeURIComponent(place.access_key_id)}:${encodeURIComponent(place.secret_access_key)}`;
  const database = new S3db({
    connectionString:
      `${url.protocol}//${credentials}@${url.host}/${place.bucket}/${place.prefix}?forcePathStyle=true` +
      `&region=${place.region}`,
    clientOptions: { httpClientOptions: { useReckerHandler: false } },
    // It takes a 404 for an error and tries again for 7 s; without retries it does not.
    executorPool: { concurrency: options.pool ?? 32, retries: options.retries ?? 0 },
    logLevel: "silent",
  });
  await database.connect();
  await database.createResource({
    name: "jobs",
    attributes: { id: "string|optional", payload: "string|required" },
    behavior: "body-overflow",
  });
  // What it is fastest with: no coordinator, three workers, and polls that hardly wait.
  const plugin = new S3QueuePlugin({
    resource: "jobs",
    autoStart: false,
    autoAcknowledge: true,
    enableCoordinator: options.coordinator ?? false,
    orderingGuarantee: options.coordinator ?? false,
    concurrency: options.concurrency ?? 3,
    pollInterval: options.poll_ms ?? 100,
    maxPollInterval: options.poll_ms ?? 100,
    logLevel: "silent",
  });
  await database.usePlugin(plugin, "s3-queue");
  return { database, plugin, jobs: database.resources.jobs };
}

const cpuSeconds = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

async function measured(messages, work) {
  const cpu = cpuSeconds();
  const began = performance.now();
  await work();
  return { messages, seconds: (performance.now() - began) / 1000, cpu_s: cpuSeconds() - cpu, requests: {} };
}

async function drain(queue, messages, size) {
  const seen = new Map();
  let all = 0;
  let last = performance.now();
  let full;
  const done = new Promise((resolve) => (full = resolve));
  const enqueue = await measured(messages, () =>
    inFlight(payloads(messages, size), (payload) => queue.jobs.enqueue({ payload }), IN_FLIGHT),
  );
  const processed = await measured(messages, async () => {
    await queue.plugin.startProcessing(async (job) => {
      seen.set(job.payload, (seen.get(job.payload) ?? 0) + 1);
      all += 1;
      last = performance.now();
      if (seen.size === messages) full(true);
    });
    last = performance.now();
    let complete = false;
    done.then(() => (complete = true));
    while (!complete && performance.now() - last < PATIENCE_MS) await Promise.race([done, sleep(500)]);
  });
  await sleep(GRACE_MS);
  return { enqueue, process: processed, lost: messages - seen.size, duplicated: all - seen.size };
}

async function roundTrips(queue, count) {
  let arrived = () => {};
  await queue.plugin.startProcessing(async () => arrived(performance.now()));
  const seconds = [];
  for (const payload of payloads(count + WARM, 100)) {
    const came = new Promise((resolve) => (arrived = resolve));
    const began = performance.now();
    await queue.jobs.enqueue({ payload });
    const at = await Promise.race([came, sleep(PATIENCE_MS)]);
    if (at === undefined) throw new Error(`a message has not come within ${PATIENCE_MS} ms`);
    seconds.push((at - began) / 1000);
    await sleep(PAUSE_MS);
  }
  return { seconds: seconds.slice(WARM) };
}

const task = JSON.parse(process.argv[2]);
const queue = await open(task);
const answer =
  task.work === "drain"
    ? await drain(queue, task.messages, task.payload_bytes)
    : await roundTrips(queue, task.messages);
console.log(JSON.stringify(answer));
// It has timers that would keep the process alive.
process.exit(0);
