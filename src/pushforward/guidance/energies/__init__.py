"""Energies: functions that say what an image, or the code behind it, should be.

| energy                         | low where                                                                   |
|--------------------------------|-----------------------------------------------------------------------------|
| `near(image)`                  | the image is as the reference, under Gaussian noise                         |
| `low_pass(image, cells)`       | the image looks so from afar: super-resolution, layouts                     |
| `masked(image, mask)`          | the image is so where the mask is 1: inpainting                             |
| `colour(rgb, mask)`            | the image, or a part of it, has this mean colour                            |
| `perceptual(image)`            | its learned perceptual distance (LPIPS) is small                            |
| `clip_text(clip, prompt)`      | CLIP finds the prompt in it                                                 |
| `clip_image(clip, image)`      | CLIP finds it like the reference                                            |
| `classifier(network, label)`   | a classifier gives it the label                                             |
| `attribute(network, label)`    | a network finds an attribute in it, or finds none                           |
| `score(network)`               | a network scores it high                                                    |
| `identity(network, image)`     | a network, such as `load_faces`, takes it for the same face                 |
| `gaussian()`                   | the code is near 0                                                          |
| `chi()`                        | the code's norm is like that of Gaussian noise                              |
| `concentration()`              | statistics of the code's parts are like those of Gaussian noise             |
| `of(function)`                 | any function `(images, code) -> (count,)` is low                            |

`5 * classifier(net, 7) + near(image)` is an energy too. `views()` shows networks each image in fixed random variants;
`load_classifier` and `load_faces` read networks from files, and `prepared` makes any network take images in [-1, 1].
"""

from pushforward.guidance.energies.codes import chi, concentration, gaussian
from pushforward.guidance.energies.energy import Energy, Function, Term, of
from pushforward.guidance.energies.networks import attribute, classifier, clip_image, clip_text, identity, score
from pushforward.guidance.energies.references import colour, low_pass, masked, near, perceptual
from pushforward.guidance.energies.views import Views, views
from pushforward.vision.classifiers import Classifier, load_classifier, prepared
from pushforward.vision.faces import FaceNet, load_faces

__all__ = [
    "Classifier",
    "Energy",
    "FaceNet",
    "Function",
    "Term",
    "Views",
    "attribute",
    "chi",
    "classifier",
    "clip_image",
    "clip_text",
    "colour",
    "concentration",
    "gaussian",
    "identity",
    "load_classifier",
    "load_faces",
    "low_pass",
    "masked",
    "near",
    "of",
    "perceptual",
    "prepared",
    "score",
    "views",
]
