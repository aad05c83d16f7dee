"""`mx.fast.metal_kernel` and `mx.fast.cuda_kernel` on a C++ compiler.

The text that MLX would give to a GPU's compiler is compiled here and really runs: 32
threads are the lanes of one simdgroup. So a kernel's arithmetic, its bounds and its
indices are tested where there is no GPU. What is not tested is what only the GPU's own
compiler knows, such as Metal's address spaces, and how fast the kernel is.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-pthread", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
METAL_NAMES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
CUDA_NAMES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
NAMES = {mx.float32: "float", mx.uint32: "uint32_t"}
# MLX gives a Metal kernel smaller inputs than this in the constant address space.
CONSTANT_SIZE = 8
HUNG_S = 120


class Emulator:
    """Stands in for one of the two functions of mx.fast.

    Attributes:
        makes: What each kernel was made of: its name, its inputs and its outputs.
        flags: Of the compiler; with sanitisers where it has them.
        calls: What each call was given, without its inputs' values.
    """

    def __init__(self, dialect, folder):
        self.dialect, self.folder = dialect, folder
        self.makes, self.calls = [], []
        self.flags = [*FLAGS, *SANITIZE]
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}")
        if self._compile([probe], "probe").returncode:
            self.flags = FLAGS  # a compiler without sanitisers
        self._compile(["-c", HERE / "run.cpp"], "run.o", check=True)

    def __call__(self, name, input_names, output_names, source, header=""):
        self.makes.append((name, tuple(input_names), tuple(output_names)))

        def kernel(
            *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=()
        ):
            assert len(inputs) == len(input_names)
            assert len(output_shapes) == len(output_dtypes) == len(output_names)
            assert len(grid) == len(threadgroup) == 3
            assert 0 < np.prod(threadgroup) <= 1024 and min(grid) > 0
            self.calls.append(
                {
                    "name": name,
                    "shapes": [tuple(a.shape) for a in inputs],
                    "dtypes": [a.dtype for a in inputs],
                    "output_shapes": output_shapes,
                    "output_dtypes": output_dtypes,
                    "grid": grid,
                    "threadgroup": threadgroup,
                    "template": dict(template),
                }
            )
            arguments = [(n, a, True) for n, a in zip(input_names, inputs, strict=True)]
            outputs = [
                mx.zeros(shape, dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            arguments += [
                (n, a, False) for n, a in zip(output_names, outputs, strict=True)
            ]
            text = self._text(arguments, source, header, template)
            program = self._build(text)
            return self._run(
                program, inputs, outputs, source, input_names, grid, threadgroup
            )

        return kernel

    def _type(self, dtype):
        names = METAL_NAMES if self.dialect == "metal" else CUDA_NAMES
        return (NAMES | names)[dtype]

    def _text(self, arguments, source, header, template):
        """A C++ file with the signature that MLX writes, and a call of it."""
        metal = self.dialect == "metal"
        signature, values, at = [], [], 0
        for name, array, is_input in arguments:
            kind = self._type(array.dtype)
            space = ""
            if metal:
                small = is_input and array.size < CONSTANT_SIZE
                space = "constant " if small else "device "
            signature.append(f"{'const ' * is_input}{space}{kind}* {name}")
            values.append(f"({kind}*)buffers[{at}]")
            at += 1
            if is_input and f"{name}_shape" in source:
                shape = "const constant int*" if metal else "const Shape"
                signature.append(f"{shape} {name}_shape")
                values.append(
                    f"(const int*)buffers[{at}]" if metal else f"*(Shape*)buffers[{at}]"
                )
                at += 1
        constants = []
        for name, value in template:
            if isinstance(value, mx.Dtype):
                constants.append(("typename", name, self._type(value)))
            else:
                constants.append(("int", name, str(value)))
        start, instance = "", "kernel_of_mlx"
        if metal:
            if "thread_position_in_grid" in source:
                signature.append("uint3 thread_position_in_grid")
                values.append("position")
            if constants:
                start = f"template <{', '.join(f'{k} {n}' for k, n, _ in constants)}>\n"
                instance += f"<{', '.join(v for _, _, v in constants)}>"
            body = source
        else:
            lines = [
                f"  using {n} = {v};"
                if k == "typename"
                else f"  constexpr int {n} = {v};"
                for k, n, v in constants
            ]
            body = "\n".join([*lines, source])
        return f"""#define DIALECT_{self.dialect.upper()}
#include "{HERE / "gpu.h"}"
{header}
{start}static void kernel_of_mlx({", ".join(signature)}) {{
{body}
}}
void kernel(char* const* buffers, uint3 position) {{
  (void)position;
  {instance}({", ".join(values)});
}}
"""

    def _build(self, text):
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        program = self.folder / name
        if not program.exists():
            file = program.with_suffix(".cpp")
            file.write_text(text)
            self._compile([file, self.folder / "run.o"], name, check=True)
        return program

    def _compile(self, files, name, check=False):
        command = [COMPILER, *self.flags, *map(str, files), "-o", self.folder / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    def _run(self, program, inputs, outputs, source, input_names, grid, threadgroup):
        files = []

        def write(data):
            files.append(self.folder / f"{program.name}.{len(files)}")
            files[-1].write_bytes(data)

        for name, array in zip(input_names, inputs, strict=True):
            write(np.array(array.view(mx.uint8) if array.ndim else array).tobytes())
            if f"{name}_shape" in source:
                shape = [*array.shape, *[0] * (8 - array.ndim)]
                write(np.array(shape, np.int32).tobytes())
        results = [program.with_suffix(f".out{i}") for i, _ in enumerate(outputs)]
        pairs = [
            str(item)
            for array, file in zip(outputs, results, strict=True)
            for item in (array.nbytes, file)
        ]
        sizes = [int(self.dialect == "cuda"), *grid, *threadgroup, len(files)]
        done = subprocess.run(
            [program, *map(str, sizes), *map(str, files), *pairs],
            capture_output=True,
            text=True,
            timeout=HUNG_S,
        )
        assert done.returncode == 0, done.stderr
        return [
            mx.array(np.fromfile(file, np.uint8)).view(array.dtype).reshape(array.shape)
            for array, file in zip(outputs, results, strict=True)
        ]
