"""What rank 0 tells the others, which are played here."""

import gc
from queue import Queue
from types import SimpleNamespace

from mlx_flash.load_options import LoadOptions
from mlx_flash.machines.lead import Lead


class Other:
    """The link to a rank that does all it is told."""

    name = "Rank 1 (b)"

    def __init__(self):
        self.told = []
        self.received = Queue()

    def send(self, message):
        self.told.append((message["do"], message.get("model")))
        if message["do"] == "load":
            self.received.put({"answer": None})


class Flash:
    machines = None


def load(lead):
    model = SimpleNamespace(flash=Flash())
    return lead.load(lambda divide: [model], "model", "1GB", LoadOptions())[0]


def test_the_others_let_go_of_a_model_that_rank_0_dropped():
    other = Other()
    lead = Lead(SimpleNamespace(settle=lambda: None), [other], "Rank 0 (a)")
    first = load(lead)
    second = load(lead)
    del first
    gc.collect()
    assert other.told == [("load", 0), ("load", 1)]  # not in the middle of anything
    lead.settle()
    assert other.told[2:] == [("unload", 0)]
    second.flash.machines.close()
    assert other.told[3:] == [("unload", 1)]
