"""What a teacher gave, kept on disk by the keys of samples, so that a teacher runs once and students many times.

A cache is a folder::

    manifest.json                     identity, fields, shards with sizes and digests, number of rows
    index.bin                         rows x int64: keys, ascending; then rows x int64: where each key's row lies
    part_0000/shard_00000.safetensors rows, in the order in which process 0 was given them
    part_0000/shard_00001.safetensors
    part_0001/...

A *row* is what the teacher gave for one sample: for every *field* a tensor of fixed dtype and shape (rows of a run have
one length). A row's *key* is the `key` of the sample in a batch, an int64 hash of source, seed, number and epoch, which
is the same on every layout.

A *shard* is a safetensors file of arrays [rows, *shape], one a field, and the int64 array `key`; any reader of that
format reads it, and nothing is ever unpickled. Fields lie apart and rows one after another, so that a row, or some
heads or columns of it, is found by arithmetic in the mapped file and nothing else of it is read. A *place* in the
index is (number of the shard in the manifest) * 2^32 + row within it. Keys are looked up by binary search in the
mapped index: opening reads the manifest and the sizes of the shards, whatever the number of rows.

*Identity* is a dict of JSON values on which the content depends: digests of the teacher and of the tokenizer, a
fingerprint of the data, temperature, `top_k`, layers. Readers compare it with their own (`TeacherCache.check`).

Writing is done beside, in `.NAME.unfinished`, by any number of processes that share the file system, each in a part
of its own. `part.json` in a part lists its whole shards: it is replaced, atomically, after a shard is on disk, so
that what a killed process leaves is known exactly and is not computed again (`CacheWriter.resume`), by fewer or by
more processes. `CacheWriter.publish` joins the parts: it writes index and manifest, and gives the folder its name by
one rename. A key that two parts wrote is indexed once if the bits are equal (the other row stays in its shard, and is
never read), else it is an error.
"""

from headway.pretrain.data.teacher_cache.fields import Field
from headway.pretrain.data.teacher_cache.reader import TeacherCache
from headway.pretrain.data.teacher_cache.writer import CacheWriter

__all__ = ["CacheWriter", "Field", "TeacherCache"]
