"""A training loop of your own around fasttrain's loader.

python examples/own_loop.py [DATA] [EPOCHS]      # DATA as in fasttrain train --data
"""

import sys

import torch
from torch import nn

from fasttrain import Recipe, build_loader, load_dataset

dataset = load_dataset(sys.argv[1] if len(sys.argv) > 1 else "cifar10")
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 10
recipe = Recipe(batch_size=128, cutout=8)  # of a recipe, a loader takes what concerns the images
train_loader = build_loader(dataset, recipe, train=True)
test_loader = build_loader(dataset, recipe, train=False)
device = train_loader.device
mean, std = (
    255 * torch.tensor(figure, device=device).view(3, 1, 1) for figure in (dataset.mean, dataset.std)
)

layers: list[nn.Module] = []
for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
    layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(dataset.classes)))
model = model.to(device, memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

for epoch in range(1, epochs + 1):
    model.train()
    for images, labels in train_loader:  # uint8 NCHW in channels_last, int64
        loss = nn.functional.cross_entropy(model((images - mean) / std), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        correct = sum((model((x - mean) / std).argmax(1) == y).sum() for x, y in test_loader)
    print(f"epoch {epoch}: test accuracy {int(correct) / len(dataset.test.labels):.2%}")
