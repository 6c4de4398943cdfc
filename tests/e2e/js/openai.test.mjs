// The official client for JavaScript.
import assert from "node:assert/strict";
import {test} from "node:test";

import OpenAI from "openai";
import {zodFunction, zodResponseFormat, zodTextFormat} from "openai/helpers/zod";
import {z} from "zod";

import {baseURL, collect, limit, shown} from "./shown.mjs";

const client = new OpenAI({baseURL, apiKey: "none", timeout: 25_000, maxRetries: 0});
const greedy = {model: shown.model, temperature: 0, max_tokens: 256};
const Seen = z.object({colour: z.enum(["red", "green", "blue"]), shape: z.enum(["circle", "square"])});

function about(url, text) {
    return [{role: "user", content: [{type: "image_url", image_url: {url}}, {type: "text", text}]}];
}

const colour = {...greedy, messages: about(shown.circle, shown.askColour)};

test("a picture, whole and streamed", limit, async () => {
    const whole = await client.chat.completions.create(colour);
    assert.equal(whole.choices[0].message.content, "red");
    assert.equal(whole.choices[0].finish_reason, "stop");
    const chunks = await collect(
        await client.chat.completions.create({...colour, stream: true, stream_options: {include_usage: true}}),
    );
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), "red");
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
    assert.equal((await client.chat.completions.stream(colour).finalMessage()).content, "red");
});

test("a thought", limit, async () => {
    const messages = about(shown.sum, shown.askSum);
    const {choices} = await client.chat.completions.create({...greedy, messages, reasoning_effort: "high"});
    assert.match(choices[0].message.reasoning_content, /\+/);
    assert.ok(choices[0].message.content);
});

test("functions are run by the client's own loop, whole and streamed", limit, async () => {
    for (const stream of [false, true]) {
        const asked = [];
        const run = ({city}) => (asked.push(city), shown.weather);
        const runner = client.chat.completions.runTools({
            ...greedy,
            stream,
            messages: [{role: "user", content: shown.askWeather}],
            tools: [{type: "function", function: {...shown.tool, parse: JSON.parse, function: run}}],
        });
        const answer = await runner.finalContent();
        assert.deepEqual(asked, [shown.city]);
        assert.ok(answer.includes(shown.weather.split(" ")[0]), answer);
    }
});

test("answers and arguments are parsed", limit, async () => {
    const format = {...colour, response_format: zodResponseFormat(Seen, "seen")};
    const whole = await client.chat.completions.parse(format);
    assert.deepEqual(Seen.parse(whole.choices[0].message.parsed), whole.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream(format).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, whole.choices[0].message.parsed);
    const tools = [zodFunction({name: "seen", parameters: Seen})];
    const called = await client.chat.completions.parse({...colour, tools, tool_choice: "required"});
    assert.equal(called.choices[0].finish_reason, "tool_calls");
    Seen.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);
});

test("responses, whole, streamed and parsed", limit, async () => {
    const content = [
        {type: "input_image", image_url: shown.circle, detail: "auto"},
        {type: "input_text", text: shown.askColour},
    ];
    const asked = {model: shown.model, temperature: 0, input: [{role: "user", content}]};
    assert.equal((await client.responses.create(asked)).output_text, "red");
    const events = await collect(await client.responses.create({...asked, stream: true}));
    assert.equal(events.at(-1).type, "response.completed");
    assert.equal(events.map((e) => (e.type === "response.output_text.delta" ? e.delta : "")).join(""), "red");
    const parsed = await client.responses.parse({...asked, text: {format: zodTextFormat(Seen, "seen")}});
    Seen.parse(parsed.output_parsed);
});

test("errors", limit, async () => {
    await assert.rejects(client.chat.completions.create({...colour, temperature: 9}), (error) => {
        assert.ok(error instanceof OpenAI.BadRequestError);
        assert.equal(error.param, "temperature");
        assert.ok(error.requestID);
        return true;
    });
    await assert.rejects(client.chat.completions.create({...colour, model: "none", stream: true}), OpenAI.NotFoundError);
});

test("a stream that is left early harms nobody", limit, async () => {
    const messages = [{role: "user", content: "Tell me everything."}];
    const stream = await client.chat.completions.create({...greedy, messages, max_tokens: 2000, ignore_eos: true, stream: true});
    for await (const chunk of stream) {
        assert.ok(chunk.choices);
        break;
    }
    assert.equal((await client.chat.completions.create(colour)).choices[0].message.content, "red");
});
