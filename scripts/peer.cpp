// Drives ik_llama.cpp for `python -m scripts.peer`: does what each line of stdin says and
// answers with a line like `seconds 1.25`.  The library writes lines of its own.
//
//   prefill N      N random tokens from an empty cache
//   depth N        the same, for what follows
//   decode N       N tokens after these, one at a time; the next decode begins at the same depth
//
// peer MODEL.gguf THREADS CONTEXT
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"

static llama_context* context;
static int vocabulary;

static bool append(int count, int position) {
    std::vector<llama_token> tokens(count);
    for (llama_token& token : tokens) token = std::rand() % vocabulary;
    const bool good = llama_decode(context, llama_batch_get_one(tokens.data(), count, position, 0)) == 0;
    llama_synchronize(context);
    return good;
}

int main(int argc, char** argv) {
    if (argc != 4) return std::fprintf(stderr, "peer MODEL.gguf THREADS CONTEXT\n"), 2;
    llama_backend_init();
    llama_model_params of_model = llama_model_default_params();
    of_model.repack_tensors = true, of_model.use_mmap = false, of_model.mla = 3;
    llama_model* model = llama_model_load_from_file(argv[1], of_model);
    if (!model) return 1;
    llama_context_params of_context = llama_context_default_params();
    of_context.n_ctx = unsigned(std::atoi(argv[3])), of_context.mla_attn = 3, of_context.flash_attn = true;
    of_context.n_threads = of_context.n_threads_batch = unsigned(std::atoi(argv[2]));
    context = llama_init_from_model(model, of_context);
    if (!context) return 1;
    vocabulary = llama_n_vocab(model);
    char what[16];
    int count, depth = 0;
    while (std::scanf("%15s %d", what, &count) == 2) {
        const bool one_by_one = !std::strcmp(what, "decode");
        if (one_by_one) llama_kv_cache_seq_rm(context, 0, depth, -1);
        else llama_kv_cache_clear(context), depth = 0;
        const auto began = std::chrono::steady_clock::now();
        for (int at = 0; at < count;) {
            const int step = one_by_one ? 1 : count - at < 512 ? count - at : 512;
            if (!append(step, depth + at)) return 1;
            at += step;
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
        if (!std::strcmp(what, "depth")) depth = count;
        std::printf("seconds %.6f\n", seconds.count());
        std::fflush(stdout);
    }
    return 0;
}
