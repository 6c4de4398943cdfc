// Vercel's AI SDK with its provider for servers like ours.
import assert from "node:assert/strict";
import {test} from "node:test";

import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
import {APICallError, Output, generateText, jsonSchema, stepCountIs, streamText, tool} from "ai";
import {z} from "zod";

import {baseURL, collect, limit, shown} from "./shown.mjs";

const provider = createOpenAICompatible({
    name: "ernie",
    baseURL,
    includeUsage: true,
    supportsStructuredOutputs: true,
});
const greedy = {model: provider(shown.model), temperature: 0, maxOutputTokens: 256, maxRetries: 0};
const Seen = z.object({colour: z.enum(["red", "green", "blue"]), shape: z.enum(["circle", "square"])});

function about(image, text) {
    return {messages: [{role: "user", content: [{type: "image", image}, {type: "text", text}]}]};
}

const colour = {...greedy, ...about(shown.circle, shown.askColour)};

test("a picture, whole and streamed", limit, async () => {
    const whole = await generateText(colour);
    assert.equal(whole.text, "red");
    assert.equal(whole.finishReason, "stop");
    const streamed = streamText(colour);
    assert.equal((await collect(streamed.textStream)).join(""), "red");
    assert.equal(await streamed.finishReason, "stop");
    assert.equal((await streamed.usage).totalTokens, whole.usage.totalTokens);
    assert.ok(whole.usage.totalTokens > 0);
});

test("a thought, whole and streamed", limit, async () => {
    const asked = {...greedy, ...about(shown.sum, shown.askSum), providerOptions: {ernie: {reasoningEffort: "high"}}};
    const whole = await generateText(asked);
    assert.match(whole.reasoningText, /\+/);
    const streamed = streamText(asked);
    assert.equal(await streamed.reasoningText, whole.reasoningText);
    assert.equal(await streamed.text, whole.text);
    assert.ok(whole.text);
});

test("functions are run in a loop of steps, whole and streamed", limit, async () => {
    for (const start of [generateText, streamText]) {
        const asked = [];
        const inputSchema = jsonSchema(shown.tool.parameters);
        const execute = async ({city}) => (asked.push(city), shown.weather);
        const result = await start({
            ...greedy,
            prompt: shown.askWeather,
            tools: {[shown.tool.name]: tool({description: shown.tool.description, inputSchema, execute})},
            stopWhen: stepCountIs(3),
        });
        const text = await result.text;
        assert.deepEqual(asked, [shown.city]);
        assert.deepEqual((await result.steps).map((step) => step.finishReason), ["tool-calls", "stop"]);
        assert.ok(text.includes(shown.weather.split(" ")[0]), text);
    }
});

test("objects, whole and streamed", limit, async () => {
    const asked = {...colour, output: Output.object({schema: Seen})};
    const {output} = await generateText(asked);
    assert.deepEqual(Seen.parse(output), output);
    const parts = await collect(streamText(asked).partialOutputStream);
    assert.deepEqual(parts.at(-1), output);
});

test("a choice among words", limit, async () => {
    const options = ["red", "green", "blue"];
    const {output} = await generateText({...colour, output: Output.choice({options})});
    assert.ok(options.includes(output));
});

test("errors", limit, async () => {
    await assert.rejects(generateText({...colour, temperature: 9}), (error) => {
        assert.ok(APICallError.isInstance(error));
        assert.equal(error.statusCode, 400);
        assert.equal(error.isRetryable, false);
        assert.match(error.message, /temperature/);
        return true;
    });
    const failures = [];
    const streamed = streamText({...greedy, model: provider("none"), prompt: "Hello", onError: ({error}) => failures.push(error)});
    await streamed.consumeStream();
    assert.deepEqual(failures.map((error) => error.statusCode), [404]);
});
