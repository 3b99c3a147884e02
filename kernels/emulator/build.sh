#!/usr/bin/env bash
# Builds libcuda.so, libnvrtc.so, libcublasLt.so and libnccl.so.2, which are an emulator, into the folder that is given.
set -euo pipefail
out=$1
cd "$(dirname "$0")"
flags=(-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wno-unused-function -Wno-unused-variable -Wno-unknown-pragmas -I../cu)
objects=()
running=()
compile() { # compile OUTPUT SOURCE [FLAGS]
    local object=$out/$1.o
    objects+=("$object")
    "${CXX:-c++}" "${flags[@]}" -c "$2" -o "$object" "${@:3}" &
    running+=($!)
    if ((${#running[@]} >= 2)); then wait "${running[0]}"; running=("${running[@]:1}"); fi
}
kernel() { # kernel FILE THREADS [HEAD_DIM KERNELS]
    local more=(-include device.h "-DSOURCE=\"../cu/$1.cu\"" "-DKERNELS=${4:-K($1)}" "-DMAX_THREADS=$2")
    if (($# > 2)); then more+=("-DHEAD_DIM=$3"); fi
    compile "$1-${3:-}" kernel.cpp "${more[@]}"
}
compile block block.cpp
compile driver driver.cpp
compile queues queues.cpp
compile tensor_cores tensor_cores.cpp -O3
compile collective kernel.cpp -include device.h '-DSOURCE="../cu/collective.cu"' '-DKERNELS=K(sum_ranks) K(place_columns)' -DMAX_THREADS=256
for file in add embed gather rope; do kernel $file 256; done
compile rms_norm kernel.cpp -include device.h '-DSOURCE="../cu/rms_norm.cu"' '-DKERNELS=K(rms_norm) K(rms_norm_fp8)' -DMAX_THREADS=256
compile swiglu kernel.cpp -include device.h '-DSOURCE="../cu/swiglu.cu"' '-DKERNELS=K(swiglu) K(swiglu_fp8)' -DMAX_THREADS=512
compile random kernel.cpp -include device.h '-DSOURCE="../cu/random.cu"' '-DKERNELS=K(random_uniform)' -DMAX_THREADS=256
compile kv_append kernel.cpp -include device.h '-DSOURCE="../cu/kv_append.cu"' '-DKERNELS=K(kv_append) K(kv_append_fp8) K(rope_append) K(rope_append_fp8)' -DMAX_THREADS=128
kernel attention_merge 128
kernel logit_stats 512
kernel choose 512
compile gemm kernel.cpp -include device.h '-DSOURCE="../cu/gemm.cu"' '-DKERNELS=K(gemm_16x128) K(gemm_64x32) K(gemm_64x128) K(gemm_128x128)' -DMAX_THREADS=256
compile gemm_int4 kernel.cpp -include device.h '-DSOURCE="../cu/gemm_int4.cu"' '-DKERNELS=K(gemm_int4_16x128) K(gemm_int4_64x32) K(gemm_int4_64x128) K(gemm_int4_128x128)' -DMAX_THREADS=256
compile quantize_int4 kernel.cpp -include device.h '-DSOURCE="../cu/quantize_int4.cu"' '-DKERNELS=K(quantize_int4_bf16) K(quantize_int4_f32)' -DMAX_THREADS=256
kernel shuffle_int4 128
compile gemm_fp8 kernel.cpp -include device.h '-DSOURCE="../cu/gemm_fp8.cu"' '-DKERNELS=K(gemm_fp8_16x128) K(gemm_fp8_64x32) K(gemm_fp8_64x128) K(gemm_fp8_128x128)' -DMAX_THREADS=256
compile quantize_fp8 kernel.cpp -include device.h '-DSOURCE="../cu/quantize_fp8.cu"' '-DKERNELS=K(quantize_fp8_bf16) K(quantize_fp8_f32)' -DMAX_THREADS=256
for head_dim in 16 32 48 64 80 96 128 256; do
    kernel attention_prefill 128 $head_dim 'K(attention_prefill) K(attention_prefill_fp8)'
    kernel attention_decode 128 $head_dim 'K(attention_decode) K(attention_decode_fp8)'
done
for process in "${running[@]}"; do wait "$process"; done
"${CXX:-c++}" -shared -Wl,-soname,libcuda.so "${objects[@]}" -o "$out/libcuda.so"
# Their work goes into libcuda's streams.
beside=("-L$out" -lcuda '-Wl,-rpath,$ORIGIN')
"${CXX:-c++}" "${flags[@]}" -shared -Wl,-soname,libnvrtc.so nvrtc.cpp -o "$out/libnvrtc.so"
"${CXX:-c++}" "${flags[@]}" -shared -Wl,-soname,libcublasLt.so cublaslt.cpp "${beside[@]}" -o "$out/libcublasLt.so"
"${CXX:-c++}" "${flags[@]}" -shared -Wl,-soname,libnccl.so.2 nccl.cpp "${beside[@]}" -o "$out/libnccl.so.2"
rm "${objects[@]}"
