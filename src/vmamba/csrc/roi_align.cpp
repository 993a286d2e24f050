// RoIAlign (He et al., arXiv 1703.06870, section 3), aligned and with as many samples as a region has cells, for one
// instruction set: compiled once for each, as scan.cpp is, and under the same rules.
//
// Every value is bit for bit that of torchvision's operator: the same operations in the same order, and none of them fused
// (CMakeLists.txt). Channels are the lanes. In the forward pass a task owns a region, in the backward pass a share of the
// channels, through all regions in turn, so that no two tasks add to one place.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "roi_align.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"

// The samples of a region along one axis.
struct Axis {
    float start, bin, samples;  // of the first bin; size of a bin; how many to a bin
    int64_t cells;              // of the map

    Axis(float from, float to, const RoIAlign& p, int64_t cells) : cells(cells) {
        start = from * p.scale - 0.5f;
        float size = to * p.scale - 0.5f - start;
        bin = size / float(p.side);
        samples = ceilf(bin);
    }
};

// Between which cells a sample lies, and how much it has of each; outside the map it is nothing.
struct Sample {
    int64_t low, high;
    float of_low, of_high;
    bool is_inside;

    Sample(const Axis& axis, int64_t bin, int64_t i) {
        float at = axis.start + float(bin) * axis.bin + (float(i) + 0.5f) * axis.bin / axis.samples;
        is_inside = at >= -1.0f && at <= float(axis.cells);
        if (!is_inside) return;
        if (at <= 0) at = 0;
        low = int64_t(at);
        high = low + 1;
        if (low >= axis.cells - 1) {
            low = high = axis.cells - 1;
            at = float(low);
        }
        of_high = at - float(low);
        of_low = 1.0f - of_high;
    }
};

struct Region {
    int64_t image;
    Axis y, x;
    float count;  // of samples to a bin

    Region(const RoIAlign& p, const float* roi)
        : image(int64_t(roi[0])), y(roi[2], roi[4], p, p.height), x(roi[1], roi[3], p, p.width) {
        count = y.samples * x.samples;
        if (!(count >= 1)) count = 1;
    }

    // Calls visit(places, weights) for each sample of a bin: the four cells around it, counted from the image's first.
    template <class Visit>
    void each_sample(int64_t row, int64_t column, Visit visit) const {
        for (int64_t i = 0; float(i) < y.samples; i++) {
            Sample down(y, row, i);
            if (!down.is_inside) continue;
            for (int64_t j = 0; float(j) < x.samples; j++) {
                Sample across(x, column, j);
                if (!across.is_inside) continue;
                int64_t places[4] = {
                    down.low * x.cells + across.low, down.low * x.cells + across.high,
                    down.high * x.cells + across.low, down.high * x.cells + across.high,
                };
                float weights[4] = {
                    down.of_low * across.of_low, down.of_low * across.of_high,
                    down.of_high * across.of_low, down.of_high * across.of_high,
                };
                visit(places, weights);
            }
        }
    }
};

size_t scratch(const RoIAlign& p) { return p.side * p.side * p.channels * sizeof(float); }

void forward(const RoIAlign& p, int64_t task, float* sums) {
    Region region(p, p.rois + task * 5);
    const float* image = p.x + region.image * p.height * p.width * p.channels;
    int64_t bins = p.side * p.side, channels = p.channels;
    memset(sums, 0, scratch(p));
    for (int64_t bin = 0; bin < bins; bin++) {
        float* sum = sums + bin * channels;
        region.each_sample(bin / p.side, bin % p.side, [&](const int64_t* places, const float* weights) {
            const float* from[4];
            for (int k = 0; k < 4; k++) from[k] = image + places[k] * channels;
            each_vector(channels, [&](int64_t i, int64_t valid, auto kind) {
                Floats value = load_part<kind.FULL>(from[0] + i, valid) * weights[0];
                for (int k = 1; k < 4; k++) value += load_part<kind.FULL>(from[k] + i, valid) * weights[k];
                store_part<kind.FULL>(sum + i, load_part<kind.FULL>(sum + i, valid) + value, valid);
            });
        });
    }
    float* y = p.y + task * channels * bins;
    for (int64_t channel = 0; channel < channels; channel++) {
        for (int64_t bin = 0; bin < bins; bin++) *y++ = sums[bin * channels + channel] / region.count;
    }
}

void backward(const RoIAlign& p, int64_t task, float* kept) {
    int64_t bins = p.side * p.side, vectors = (p.channels + LANES - 1) / LANES;
    int64_t begin = vectors * task / p.tasks * LANES;
    int64_t end = smaller(vectors * (task + 1) / p.tasks * LANES, p.channels), width = end - begin;
    for (int64_t n = 0; n < p.regions; n++) {
        Region region(p, p.rois + n * 5);
        float* image = p.grad_x + region.image * p.height * p.width * p.channels + begin;
        const float* grad = p.grad + (n * p.channels + begin) * bins;
        for (int64_t i = 0; i < width; i++) {
            for (int64_t bin = 0; bin < bins; bin++) kept[bin * width + i] = *grad++;
        }
        for (int64_t bin = 0; bin < bins; bin++) {
            const float* of_bin = kept + bin * width;
            region.each_sample(bin / p.side, bin % p.side, [&](const int64_t* places, const float* weights) {
                for (int k = 0; k < 4; k++) {
                    float* to = image + places[k] * p.channels;
                    each_vector(width, [&](int64_t i, int64_t valid, auto kind) {
                        Floats value = load_part<kind.FULL>(of_bin + i, valid) * weights[k] / region.count;
                        store_part<kind.FULL>(to + i, load_part<kind.FULL>(to + i, valid) + value, valid);
                    });
                }
            });
        }
    }
}

}  // namespace

extern const RoIAlignKernels roi_align;
const RoIAlignKernels roi_align = {scratch, forward, backward};

}  // namespace VMAMBA_ISA
