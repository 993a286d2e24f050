// A VSS block as a sequence of the library's own functions. What Python and torch do between two of them, twelve times a
// block, takes as long as the work of a small grid; here nothing is between them, and what they leave each other lies in
// one piece of memory.

#include "block.h"

#include <iterator>

#include "interface.h"
#include "memory.h"

namespace {

// Values of the widest layer that are computed at a time where pixels do not mix, 8 MB in float32.
constexpr int64_t STRETCH = 1 << 21;

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t size_of(int32_t bfloat16) { return bfloat16 ? 2 : 4; }

// A parameter that is computed with in float32, and how many numbers it has.
struct Small {
    const float* Block::*place;
    int64_t count;
};

struct Weight {
    const void* data;
    const float* bias;
    int32_t bfloat16;
};

// The calls of one block, in order, until one of them fails.
struct Calls {
    const Block& p;
    bool failed = false;

    Layer layer(const void* x, void* y, int32_t bfloat16) const {
        Layer call{};
        call.x = x, call.y = y, call.bfloat16 = call.y_bfloat16 = bfloat16, call.threads = p.threads;
        return call;
    }

    void norm(
        const void* x, void* y, int64_t rows, int64_t channels, const float* weight, const float* bias, float eps,
        int32_t x_bfloat16
    ) {
        if (failed) return;
        Layer call = layer(x, y, x_bfloat16);
        call.width = rows, call.channels = channels, call.weight = weight, call.bias = bias, call.eps = eps;
        call.y_bfloat16 = p.low_products;
        failed = vmamba_layer_norm(&call);
    }

    void multiply(Product call) {
        if (failed) return;
        call.threads = p.threads;
        failed = vmamba_linear(&call);
    }

    // y = act(x · weightᵀ + bias) + residual; x in the dtype of the products.
    void product(
        const void* x, void* y, int64_t rows, int64_t inputs, int64_t outputs, const Weight& weight, int32_t y_bfloat16,
        bool gelu = false, const void* residual = nullptr
    ) {
        Product call{};
        call.rows = rows, call.inputs = inputs, call.outputs = outputs, call.x = x, call.y = y, call.residual = residual;
        call.weight = weight.data, call.bias = weight.bias, call.weight_bfloat16 = weight.bfloat16;
        call.bfloat16 = p.low_products, call.y_bfloat16 = y_bfloat16, call.gelu = gelu;
        multiply(call);
    }

    void convolve(const void* x, void* y) {
        if (failed) return;
        Layer call = layer(x, y, p.low_products);
        call.batch = p.batch, call.height = p.height, call.width = p.width, call.channels = p.inner;
        call.weight = p.conv_weight, call.bias = p.conv_bias;
        failed = vmamba_depthwise_silu(&call);
    }

    void elementwise(int32_t (*function)(Layer*), const void* x, void* y, int64_t values) {
        if (failed) return;
        Layer call = layer(x, y, p.low_products);
        call.channels = values;
        failed = function(&call);
    }

    Scan scan(const void* u, const float* projected, void* y) const {
        int64_t each = p.rank + 2 * p.states;
        Scan call{};
        call.batch = p.batch, call.height = p.height, call.width = p.width, call.channels = p.inner, call.groups = 1;
        call.states = p.states, call.rank = p.rank, call.routes = p.routes, call.route_bits = p.route_bits;
        call.pixel_stride = p.routes * each, call.route_stride = each, call.softplus = 1;
        call.u = u, call.dt_low = projected, call.B = projected + p.rank, call.C = call.B + p.states, call.y = y;
        call.dt_weight = p.dt_weight, call.dt_bias = p.dt_bias, call.A = p.A, call.D = p.D;
        call.bfloat16 = p.low_products, call.threads = p.threads;
        return call;
    }
};

}  // namespace

int32_t run_block(const Block& given) {
    Block p = given;
    Calls calls{p};
    int64_t rows = p.batch * p.height * p.width, channels = p.channels, inner = p.inner, low = p.low_products;
    int64_t wide_inner = (p.gated ? 2 : 1) * inner;
    int64_t pixels = (p.stretch ? p.stretch : STRETCH) / larger(wide_inner, p.hidden);
    int64_t parts = divide_up(rows, larger(1, pixels)), longest = divide_up(rows, parts);
    int64_t size = size_of(low), parameters = p.routes * (p.rank + 2 * p.states);
    bool has_mlp = p.fc1_weight;
    const Small smalls[] = {
        // in the order of the bits of `low_parameters`
        {&Block::norm1_weight, channels},
        {&Block::norm1_bias, channels},
        {&Block::in_bias, wide_inner},
        {&Block::conv_weight, inner * TAPS},
        {&Block::conv_bias, inner},
        {&Block::x_weight, parameters * inner},
        {&Block::dt_weight, p.routes * inner * p.rank},
        {&Block::dt_bias, p.routes * inner},
        {&Block::D, p.routes * inner},
        {&Block::norm_weight, inner},
        {&Block::norm_bias, inner},
        {&Block::out_bias, channels},
        {&Block::norm2_weight, channels},
        {&Block::norm2_bias, channels},
        {&Block::fc1_bias, p.hidden},
        {&Block::fc2_bias, channels},
    };

    // Of all pixels: what the convolution takes, which becomes the scan's result; what it gives; the gate; the scan's
    // parameters; routes that are kept apart. Of a stretch: normalised pixels, x after SS2D, the MLP's hidden layer. Of the
    // parameters in bfloat16: the same in float32.
    int64_t bytes_apart = bytes_for_routes(calls.scan(nullptr, nullptr, nullptr));
    Memory memory;
    int64_t whole = rows * inner * size;
    int64_t first = memory.piece(whole), image = memory.piece(whole), gate = memory.piece(p.gated ? whole : 0);
    int64_t projected = memory.piece(rows * parameters * 4);
    int64_t apart = memory.piece(bytes_apart);
    int64_t normalised = memory.piece(longest * larger(channels, inner) * size);
    int64_t wide = memory.piece(low ? longest * inner * 4 : 0);
    int64_t middle = memory.piece(has_mlp ? longest * channels * size_of(p.bfloat16) : 0);
    int64_t hidden = memory.piece(longest * p.hidden * size);
    int64_t widened[std::size(smalls)];
    for (size_t i = 0; i < std::size(smalls); i++) {
        widened[i] = memory.piece(p.low_parameters >> i & 1 ? smalls[i].count * 4 : 0);
    }
    char* base = memory.obtain();
    if (!base) return 1;
    auto at = [&](int64_t piece, int64_t offset = 0) { return base + piece + offset; };
    for (size_t i = 0; i < std::size(smalls); i++) {
        if (!(p.low_parameters >> i & 1)) continue;
        const float*& parameter = p.*smalls[i].place;
        calls.elementwise(vmamba_widen, parameter, at(widened[i]), smalls[i].count);
        parameter = reinterpret_cast<const float*>(at(widened[i]));
    }

    auto in_stretches = [&](auto function) {
        for (int64_t i = 0; i < parts; i++) {
            int64_t begin = rows * i / parts;
            function(begin, rows * (i + 1) / parts - begin);
        }
    };
    const char* x = static_cast<const char*>(p.x);
    char* y = static_cast<char*>(p.y);

    in_stretches([&](int64_t begin, int64_t count) {
        const char* pixels = x + begin * channels * size_of(p.bfloat16);
        calls.norm(pixels, at(normalised), count, channels, p.norm1_weight, p.norm1_bias, p.norm1_eps, p.bfloat16);
        Weight weight{p.in_weight, p.in_bias, p.low_in};
        calls.product(at(normalised), at(first, begin * inner * size), count, channels, inner, weight, low);
        if (!p.gated) return;
        weight.data = static_cast<const char*>(weight.data) + inner * channels * size_of(p.low_in);
        if (weight.bias) weight.bias += inner;
        calls.product(at(normalised), at(gate, begin * inner * size), count, channels, inner, weight, low);
    });
    calls.convolve(at(first), at(image));
    in_stretches([&](int64_t begin, int64_t count) {
        char* u = at(image, begin * inner * size);
        float* values = reinterpret_cast<float*>(at(projected)) + begin * parameters;
        if (low) calls.elementwise(vmamba_widen, u, at(wide), count * inner), u = at(wide);
        Product call{};
        call.rows = count, call.inputs = inner, call.outputs = parameters, call.x = u, call.y = values;
        call.weight = p.x_weight;
        calls.multiply(call);
    });
    if (calls.failed) return 1;
    Scan scan = calls.scan(at(image), reinterpret_cast<float*>(at(projected)), at(first));
    if (bytes_apart) scan.route_y = reinterpret_cast<float*>(at(apart));
    if (vmamba_scan(&scan)) return 1;

    in_stretches([&](int64_t begin, int64_t count) {
        char* mixed = at(first, begin * inner * size);
        int64_t offset = begin * channels * size_of(p.bfloat16);
        char* after = has_mlp ? at(middle) : y + offset;
        calls.norm(mixed, at(normalised), count, inner, p.norm_weight, p.norm_bias, p.norm_eps, low);
        if (p.gated) calls.elementwise(vmamba_gate, at(gate, begin * inner * size), at(normalised), count * inner);
        Weight out{p.out_weight, p.out_bias, p.low_out};
        calls.product(at(normalised), after, count, inner, channels, out, p.bfloat16, false, x + offset);
        if (!has_mlp) return;
        calls.norm(after, at(normalised), count, channels, p.norm2_weight, p.norm2_bias, p.norm2_eps, p.bfloat16);
        Weight fc1{p.fc1_weight, p.fc1_bias, p.low_fc1}, fc2{p.fc2_weight, p.fc2_bias, p.low_fc2};
        calls.product(at(normalised), at(hidden), count, channels, p.hidden, fc1, low, true);
        calls.product(at(hidden), y + offset, count, p.hidden, channels, fc2, p.bfloat16, false, after);
    });
    return calls.failed;
}
