"Requests of many callers run together, and each gets what it would have got alone."

import asyncio

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from servers import linear_bundle

from mlkit.bundle import Bundle, Manifest, Tensor, package
from mlkit.serve.batcher import Batcher, FairQueue, Item, Pace
from mlkit.serve.models import Answer, Models, Work
from mlkit.serve.protocol import ServeError


def summing_bundle(folder):
    "Rows of any length in, their sum out: whole numbers, so that answers are equal and not only close."
    x, value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"]), helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch", 1])
    axes = helper.make_node("Constant", [], ["axes"], value=helper.make_tensor("axes", TensorProto.INT64, [1], [1]))
    graph = helper.make_graph([axes, helper.make_node("ReduceSum", ["x", "axes"], ["value"], keepdims=1)], "sum", [x], [value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    sides = (Tensor("x", "float32", ("batch", "length")),), (Tensor("value", "float32", ("batch", 1)),)
    package(folder, model, Manifest("sum", "regression", *sides, {"x": {"kind": "numeric", "shape": ["length"]}}), pl.DataFrame({"x": [[1.0, 2, 3]]}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("batching")
    return summing_bundle(home / "sum"), linear_bundle(home / "linear")


requests = st.lists(
    st.fixed_dictionaries({
        "rows": st.integers(1, 9), "length": st.integers(1, 4), "client": st.sampled_from("abc"), "pause": st.sampled_from([0, 0, 0, 0.001]),
        "spoiled": st.sampled_from([None] * 6 + ["late", "gone", "wrong"]), "table": st.booleans(),
    }), min_size=1, max_size=40,
)  # fmt: skip


def asked(seed: int, request: dict) -> np.ndarray:
    return np.random.default_rng(seed).integers(-999, 999, (request["rows"], request["length"])).astype(np.float32)


@given(requests, st.integers(1, 16), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_whatever_the_interleaving_each_caller_gets_its_own_answer(folders, requests, batch, lanes):
    async def everyone():
        models = Models(asyncio.get_running_loop(), Pace(batch=batch, queue=10_000, lanes=lanes, patience=1e9))
        version, answers = await models.load(folders[0]), {}
        for seed, request in enumerate(requests):
            values = asked(seed, request)
            tensors = {"x": values.astype(np.int32) if request["spoiled"] == "wrong" else values}
            deadline = -1.0 if request["spoiled"] == "late" else np.inf
            done = lambda answer, seed=seed: answers.setdefault(seed, []).append(answer)
            try:
                version.submit(Work(0, tensors, table=request["table"]), done, request["client"], deadline, lambda gone=request["spoiled"] == "gone": gone)
            except ServeError as error:
                done(error)
            if request["pause"]:
                await asyncio.sleep(request["pause"])
        while len(answers) < len(requests):
            await asyncio.sleep(0.001)
        models.unload("sum")
        await asyncio.sleep(0.03)
        return answers

    answers = asyncio.run(asyncio.wait_for(everyone(), 30))
    for seed, request in enumerate(requests):
        assert len(answers[seed]) == 1, "a caller is answered once"
        (answer,) = answers[seed]
        if request["spoiled"]:
            assert answer.status == {"late": 504, "gone": 499, "wrong": 400}[request["spoiled"]]
        else:
            assert type(answer) is Answer and answer.outputs["value"].ravel().tolist() == asked(seed, request).sum(1).tolist()
            assert (answer.table is not None and answer.table.to_series().to_list() == asked(seed, request).sum(1).tolist()) or not request["table"]


def test_batched_answers_are_those_of_the_bundle_alone(folders):
    bundle, frame = Bundle.load(folders[1]), pl.DataFrame({"x": np.random.default_rng(0).integers(-99, 99, (50, 3)).astype(np.float32)})

    async def everyone():
        models = Models(asyncio.get_running_loop(), Pace(batch=7))
        version, answers = await models.load(folders[1]), []
        for i in range(50):
            future = asyncio.get_running_loop().create_future()
            version.submit(Work(0, frame=frame[i : i + 1], table=True), future.set_result)
            answers.append(future)
        found = pl.concat([a.table for a in await asyncio.gather(*answers)])
        models.unload("linear")
        return found

    assert asyncio.run(everyone()).equals(bundle.predict(frame))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5), st.sampled_from("xy")), min_size=1, max_size=60), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_the_queue_loses_nothing_and_mixes_nothing(pushed, limit):
    queue = FairQueue()
    for number, (client, rows, key) in enumerate(pushed):
        queue.push(Item(number, rows, key, print, client))
    taken = []
    while queue.rows:
        batch = queue.take(limit)
        assert batch and len({item.key for item in batch}) == 1
        assert sum(item.rows for item in batch) <= limit or len(batch) == 1
        taken += [item.payload for item in batch]
    assert sorted(taken) == list(range(len(pushed))) and not queue.lines
    for client in "abcd":
        for key in "xy":
            own = [n for n in taken if pushed[n][0] == client and pushed[n][2] == key]
            assert own == sorted(own), "the requests of a client keep their order"


def test_a_flood_of_one_client_costs_another_no_more_than_a_turn():
    order = []

    async def flood():
        batcher = Batcher(lambda batch: [item.payload for item in batch], asyncio.get_running_loop(), Pace(batch=4, queue=100))
        for i in range(100):
            batcher.submit(Item(i, 1, "k", order.append, "flood"))
        batcher.submit(Item("single", 1, "k", order.append, "quiet"))  # there is no room, so the flood makes some
        while len(order) < 101:
            await asyncio.sleep(0.001)
        batcher.close()

    asyncio.run(flood())
    answers = [o for o in order if not isinstance(o, ServeError)]
    assert answers.index("single") < 8 and [o.status for o in order if isinstance(o, ServeError)] == [429]


def test_a_request_of_more_rows_than_may_wait_is_answered_when_nothing_waits(folders):
    async def large():
        models, rows, answers = Models(asyncio.get_running_loop(), Pace(batch=4, queue=8)), 50, []
        version = await models.load(folders[1])
        work = lambda: Work(0, {"x": np.tile(np.arange(rows, dtype=np.float32)[:, None], 3)})
        version.submit(work(), answers.append)
        with pytest.raises(ServeError, match="try again later"):  # now something waits
            version.submit(work(), answers.append)
        while not answers:
            await asyncio.sleep(0.001)
        return answers

    assert [a.outputs["logits"][:, 0].tolist() for a in asyncio.run(large())] == [[2.0 * i for i in range(50)]]
