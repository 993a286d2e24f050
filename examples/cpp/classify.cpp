// Classifies pictures with a package of `vmamba export --format aoti --embed true`, without Python:
//     classify model.pt2 PICTURE.ppm ...        (binary PPM: convert photo.jpg -resize 224x224! photo.ppm)
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

int main(int count, char** names) {
    if (count < 2) {
        std::cerr << "usage: classify model.pt2 PICTURE.ppm ...\n";
        return 2;
    }
    torch::inductor::AOTIModelPackageLoader model(names[1]);
    std::cout << "classes: " << model.get_metadata()["class_names"] << "\n";
    for (int i = 2; i < count; i++) {
        std::ifstream file(names[i], std::ios::binary);
        std::string magic;
        int64_t width = 0, height = 0, largest = 0;
        file >> magic >> width >> height >> largest;
        std::string pixels(std::istreambuf_iterator<char>(file.ignore()), {});
        if (magic != "P6" || largest != 255 || width < 1 || height < 1 || pixels.size() / 3 / width < size_t(height)) {
            std::cerr << names[i] << " is no binary PPM of 8 bits\n";
            return 1;
        }
        at::Tensor picture = at::from_blob(pixels.data(), {1, height, width, 3}, at::kByte).permute({0, 3, 1, 2});
        auto results = model.run({picture.contiguous()});  // labels (1,) and probabilities (1, classes)
        std::cout << names[i] << ": " << results[0].item<int64_t>() << " " << results[1].max().item<float>() << "\n";
    }
}
