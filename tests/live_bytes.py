"""Peak memory of tensors in a block."""

import weakref

import torch


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Peak bytes of live storages, excluding those of ``model``."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.alive.keys() | self.known
            ):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
                self.most = max(self.most, self.now)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key)
