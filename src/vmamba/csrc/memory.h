// Memory for a call, kept for the next one.
#pragma once

#include <stdlib.h>

#include <atomic>
#include <cstdint>

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of one allocation: first all are asked for, then the memory is obtained. It goes back to the system only when there
// is more of it than this, or when another thread has left some: the system clears the pages of what it hands out, which
// takes longer than filling them.
constexpr int64_t MOST_KEPT = 128 << 20;

class Memory {
    struct Kept {
        int64_t size;
        char padding[56];
    };
    static inline std::atomic<Kept*> kept{nullptr};
    int64_t used = sizeof(Kept);
    Kept* memory = nullptr;

  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() {
        if (memory && memory->size <= MOST_KEPT) memory = kept.exchange(memory);
        free(memory);
    }

    // Where a piece of so many bytes begins.
    int64_t piece(int64_t bytes) {
        int64_t begin = used;
        used += divide_up(bytes, 64) * 64;
        return begin;
    }

    // From what the pieces' places count; null where there is no memory.
    char* obtain() {
        memory = kept.exchange(nullptr);
        if (!memory || memory->size < used) {
            free(memory);
            void* fresh = nullptr;
            if (posix_memalign(&fresh, 64, used)) fresh = nullptr;
            memory = static_cast<Kept*>(fresh);
            if (!memory) return nullptr;
            memory->size = used;
        }
        return reinterpret_cast<char*>(memory);
    }
};
