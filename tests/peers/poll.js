// Polls for exports with Node's http and https: node poll.js TASK
//
// TASK is JSON: url, ca (null for HTTP), token, ids as [size, id], times. Prints how many milliseconds
// each poll took, by size and by whether the connection was kept.

"use strict";
const assert = require("node:assert");
const fs = require("node:fs");

const task = JSON.parse(process.argv[2]);
const http = task.ca ? require("node:https") : require("node:http");
const ca = task.ca ? fs.readFileSync(task.ca) : undefined;

function poll(agent, size, id) {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const options = { method: "POST", agent, ca, headers: { "X-Api-Key": task.token } };
    const request = http.request(task.url, options, (response) => {
      const chunks = [];
      response.on("data", (chunk) => chunks.push(chunk));
      response.on("end", () => {
        const took = performance.now() - start;
        const answer = JSON.parse(Buffer.concat(chunks).toString());
        assert.strictEqual(response.statusCode, 200);
        assert.strictEqual(answer.state, "Finished");
        assert.strictEqual(answer.ext_response.body.length, size);
        resolve(took);
      });
    });
    request.on("error", reject);
    // The length is not known in advance, so Node sends it in chunks.
    request.write(JSON.stringify({ id }));
    request.end();
  });
}

async function main() {
  const times = {};
  for (const [size, id] of task.ids) {
    for (const [kind, keepAlive] of [["kept", true], ["new", false]]) {
      const agent = new http.Agent({ keepAlive, maxSockets: 1 });
      const took = [];
      for (let time = 0; time < task.times; time++) {
        took.push(await poll(agent, size, id));
      }
      times[`${size} ${kind}`] = took;
      agent.destroy();
    }
  }
  console.log(JSON.stringify(times));
}

main();
