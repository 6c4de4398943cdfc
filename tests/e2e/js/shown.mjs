// Where the server is, what is shown to it and what it is asked: see tests/e2e/shown.py.
export const baseURL = `${process.env.ERNIE_URL}/v1`;
export const shown = JSON.parse(process.env.ERNIE_SHOWN);
export const limit = {timeout: 30_000};

export async function collect(stream) {
    const all = [];
    for await (const one of stream) all.push(one);
    return all;
}
