"""`aft-ray ask`: one question to a served model, through the stock openai client."""

from __future__ import annotations

import openai

from aft_ray.errors import EngineError


def ask_and_print(question: str, base_url: str, model: str, api_key: str, show_proposals: bool) -> None:
    """Print the answer as it is generated, and with `show_proposals` the drafts before it."""
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=api_key, max_retries=0)
    try:
        model = model or client.models.list().data[-1].id
        if show_proposals:
            _print_with_proposals(client, model, question)
        else:
            _print_stream(client, model, question)
    except openai.APIConnectionError:
        raise EngineError(f"nothing answers at {base_url}. Start it with: aft-ray serve --config ...") from None
    except openai.APIStatusError as error:
        raise EngineError(f"{base_url}: status {error.status_code}: {error.message}") from None


def _print_stream(client: openai.OpenAI, model: str, question: str) -> None:
    stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


def _print_with_proposals(client: openai.OpenAI, model: str, question: str) -> None:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        extra_body={"aft": {"include_proposals": True}},
    )
    layers = (reply.model_extra or {})["aft"]["layers"]
    for depth, layer in enumerate(layers[:-1]):
        for draft in layer:
            print(f"── layer {depth}, draft {draft['index'] + 1} " + "─" * 40)
            print(draft["text"].strip())
    print("── answer " + "─" * 51)
    print(reply.choices[0].message.content)
    usage = reply.usage
    if usage is not None:
        print(f"({model}; {usage.prompt_tokens} prompt + {usage.completion_tokens} answer tokens over all calls)")
