#!/usr/bin/env python
"""Embeddings or classifications over HTTP, in the requests and answers of text-embeddings-inference.

    python examples/serve.py MODEL_FOLDER --dtype int8 --port 8080
    curl localhost:8080/embed -H 'Content-Type: application/json' -d '{"inputs": ["a text", "another"]}'

A sentence embedder answers POST /embed, a classifier POST /predict. While the model computes, further texts wait, and
all that wait are the next batch. Texts that are too long are cut.
"""

import argparse
import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Field
from sentence_transformers import SentenceTransformer
from transformers import pipeline

import fastbert_hf

MOST_INPUTS, MOST_WAITING = 256, 2048  # texts of a request; texts that wait before requests are turned away
Compute = Callable[[list], list]  # texts, or pairs of texts, to as many answers


def encodable(text: str) -> str:
    """The text, which JSON can break: a tokenizer refuses half a surrogate pair, and the batch around it."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(encodable)]


class Inputs(BaseModel):
    inputs: Text | Annotated[list[Text | tuple[Text, Text]], Field(min_length=1, max_length=MOST_INPUTS)]


class Batcher:
    """Texts of all requests, computed together: never more than `most` at a time, in the order of their arrival."""

    def __init__(self, compute: Compute, most: int):
        self.compute, self.most, self.waiting = compute, most, asyncio.Queue()

    async def answer(self, texts: list) -> list:
        if self.waiting.qsize() + len(texts) > MOST_WAITING:
            raise HTTPException(429, "the model is overloaded")
        answers = [asyncio.get_running_loop().create_future() for _ in texts]
        for item in zip(texts, answers):
            self.waiting.put_nowait(item)
        return await asyncio.gather(*answers)

    async def run(self) -> None:
        while True:
            items = [await self.waiting.get()]
            while len(items) < self.most and not self.waiting.empty():
                items.append(self.waiting.get_nowait())
            try:
                found = await asyncio.to_thread(self.compute, [text for text, _ in items])
            except Exception as error:
                found = [error] * len(items)
            for (_, answer), value in zip(items, found):
                if not answer.done():  # a client that left has cancelled its own
                    answer.set_exception(value) if isinstance(value, Exception) else answer.set_result(value)


def load(folder: str, dtype: str | None) -> tuple[str, Compute]:
    """The path that a model answers on, and how."""

    def prepared(model: torch.nn.Module) -> torch.nn.Module:
        return model if dtype is None else fastbert_hf.prepare_for_inference(model, dtype=dtype)

    if (Path(folder) / "modules.json").exists():
        embedder = prepared(SentenceTransformer(folder, device="cpu"))
        return "/embed", lambda texts: embedder.encode(texts, batch_size=len(texts)).tolist()
    classifier = pipeline("text-classification", model=folder, device="cpu", top_k=None)
    classifier.model = prepared(classifier.model)

    def classify(texts: list) -> list:
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        inputs = [dict(zip(("text", "text_pair"), pair)) for pair in pairs]
        return classifier(inputs, batch_size=len(inputs), truncation=True)

    return "/predict", classify


def application(folder: str, dtype: str | None = None, most: int = 32) -> FastAPI:
    """The server of a model folder.

    Args:
        folder: a sentence embedder or a classifier. dtype: to prepare it for; None: as it was saved.
        most: texts of a batch.
    """
    path, compute = load(folder, dtype)
    batcher = Batcher(compute, most)

    @asynccontextmanager
    async def batching(app: FastAPI):
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title=Path(folder).resolve().name, lifespan=batching)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"][:2]))
        return JSONResponse({"error": f"{where}: {problem['msg']}", "error_type": "Validation"}, 422)

    @app.post(path)
    async def answer(request: Inputs) -> list[Any]:
        if isinstance(request.inputs, list):
            return await batcher.answer(request.inputs)
        (found,) = await batcher.answer([request.inputs])
        return [found] if path == "/embed" else found

    @app.get("/health")
    async def health() -> dict:
        return {}

    @app.get("/info")
    async def info() -> dict:
        return {"model_id": app.title, "model_dtype": dtype or "as saved", "max_client_batch_size": MOST_INPUTS}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a sentence embedder or a classifier")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), help="prepare the model for it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    uvicorn.run(application(arguments.model, arguments.dtype), host=arguments.host, port=arguments.port)
