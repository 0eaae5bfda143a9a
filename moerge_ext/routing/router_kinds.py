"""What `handle.queries` asks, by the `source` of a method, and how it is made."""

from __future__ import annotations

TRAINED = "moerge_ext.load_text_router(folder, experts, embedder)"
ROUTERS = {
    "instruction": "moerge_ext.QueryRouter(experts, embedder, ...)",
    "examples": "moerge_ext.ExampleRouter(experts, embedder)",
    "ask": "moerge_ext.AskRouter(experts, writer)",
    "likelihood": "moerge_ext.LikelihoodRouter(model, tokenizer, experts.names)",
    "benchmark": TRAINED,
    "zooter": TRAINED,
    "routoo": TRAINED,
    "routellm-mf": TRAINED,
    "routellm-classifier": TRAINED,
    "classifier": TRAINED,
    "retriever": TRAINED,
    "tfidf": TRAINED,
}
