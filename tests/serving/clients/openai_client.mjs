// OpenAI's JavaScript client: plain, streamed, aborted, with tools, its error classes. Run by test_stock_clients.py.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three rivers." }];
const asked = { model: "aft", messages, seed: 5 };

const plain = await client.chat.completions.create(asked);
const { content } = plain.choices[0].message;
assert.ok(content && plain._request_id);
const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.deepEqual(names, ["base", "sft", "aft"]);

const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
let numPieces = 0;
stream.on("content", () => numPieces++);
const built = await stream.finalChatCompletion();
assert.equal(built.choices[0].message.content, content);
assert.ok(numPieces > 2);
assert.equal(built.usage.total_tokens, plain.usage.total_tokens);
assert.equal((await client.chat.completions.create({ ...asked, n: 2 })).choices.length, 2);

const calls = [];
const runner = client.chat.completions.runTools(
  {
    ...asked,
    tools: [
      {
        type: "function",
        function: {
          name: "look_up",
          parameters: { type: "object" },
          parse: JSON.parse,
          function: (found) => (calls.push(found), "found"),
        },
      },
    ],
  },
  { maxChatCompletions: 2 },
);
await runner.done();
assert.ok(calls.length >= 1 && calls[0].text);

const lists = await client.completions.create({ model: "aft", prompt: ["Hello", "Good day"], stream: true });
const texts = ["", ""];
for await (const chunk of lists) for (const choice of chunk.choices) texts[choice.index] += choice.text;
assert.ok(texts.every((text) => text.length > 0));

const aborted = await client.chat.completions.create({ ...asked, stream: true, aft: { num_proposals: 6 } });
setTimeout(() => aborted.controller.abort(), 300);
let numRead = 0;
for await (const _ of aborted) numRead++;
assert.ok(numRead < 10, `read ${numRead}`);

const response = await client.responses.create({ model: "aft", input: "Name three rivers." });
assert.ok(response.output_text);
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 3 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ ...asked, model: "nosuch" }), OpenAI.NotFoundError);
