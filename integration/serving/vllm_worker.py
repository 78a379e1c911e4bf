"""Switches sparse adapters on a running vLLM engine: an extension of its workers.

    llm = LLM(model="meta-llama/Llama-3.1-8B", worker_extension_cls="integration.serving.vllm_worker.SpftWorker")
    llm.collective_rpc("load_spft", args=("docstrings", "outputs/docstrings"))
    llm.collective_rpc("use_spft", args=("docstrings",))    # or (None,): the base model alone
    llm.reset_prefix_cache()                                # what was cached under the other weights

Every worker changes the entries of the weights that it holds, in place: nothing is allocated on the engine's side, and
its captured CUDA graphs stay valid. Switch between requests, not during them.
"""

from __future__ import annotations

from axolotl_spft.serving import Switch


class SpftWorker:
    """Methods that vLLM adds to each of its workers.

    Of a worker it reads ``model_runner.model``, ``rank`` and ``parallel_config``, where tensor parallelism counts ranks
    first.
    """

    _spft: Switch | None = None

    def load_spft(self, name: str, folder: str) -> None:
        """Read a saved sparse adapter under a name, on every worker."""
        self._switch().load(name, folder)

    def use_spft(self, name: str | None) -> None:
        """Serve the adapter of this name from now on; None: the base model alone."""
        self._switch().use(name)

    def _switch(self) -> Switch:
        if self._spft is None:
            parallel = self.parallel_config
            self._spft = Switch(
                self.model_runner.model,
                rank=self.rank % parallel.tensor_parallel_size,
                ranks=parallel.tensor_parallel_size,
                partial=parallel.pipeline_parallel_size > 1,
            )
        return self._spft
