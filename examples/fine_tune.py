"""Fine-tune a trained network on a folder of images, and name what it gets wrong.

    python examples/fine_tune.py RUN FOLDER [EPOCHS]

RUN: a run's folder, of `fasttrain train` on CIFAR-10 for instance. FOLDER: a folder of images per class; they
are scaled to the resolution that the network was trained on.
"""

import dataclasses
import sys

import fasttrain

if len(sys.argv) < 3:
    sys.exit(__doc__)
run_folder, folder = sys.argv[1:3]
source = fasttrain.load_run(run_folder)
recipe = dataclasses.replace(
    source.recipe,  # the same network, or its weights do not fit
    name="fine-tuned",
    epochs=int(sys.argv[3]) if len(sys.argv) > 3 else 5,
    batch_size=32,
    init_from=str(source.folder),
    max_lr=source.result["max_lr"] / 4,  # the weights are good already; only the last layer is new
    class_weights="balanced",
)
run = fasttrain.train(recipe, data=f"folder:{folder}")

found = fasttrain.evaluate(run.folder)
classes = fasttrain.load_model(run.folder).classes
print(
    f"{found.accuracy:.2%} of {len(found.labels_N)} test images, macro-F1 {found.macro_f1(len(classes)):.2%}"
)
for truth, prediction, count in found.top_confusions(len(classes), 5):
    print(f"{count} of {classes[truth]} taken for {classes[prediction]}")
print(f"all of it to look at: {run.folder / 'report.html'}")
