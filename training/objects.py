"""The objects that the tiny model can draw: icons of ``@iconify-json/fluent-emoji-flat`` and their nouns.

One entry is ``icon``, ``icon=noun`` or ``icon=noun/other noun/…``; a bare icon name is its own noun, with
dashes read as spaces. A noun that ends in ``*`` takes no article ("scissors", not "a scissors"). Chosen by
eye: no flags, no people, nothing that is mainly letters, and one of each set of near-twins, because two
icons that a person confuses could not be judged apart either.
"""

from dataclasses import dataclass

_TABLE = """
ant, bat, bear, beaver, bird, black-cat, blowfish=pufferfish/blowfish, butterfly, camel, cat,
baby-chick=chick/baby chick, chipmunk=chipmunk/squirrel, cow, crab, cricket, crocodile, deer, dog, dolphin,
dove, dragon, duck, eagle, elephant, fish, flamingo, fox, frog, giraffe, goat, gorilla, hamster,
hatching-chick, hedgehog, hippopotamus=hippo/hippopotamus, honeybee=bee/honeybee, horse, jellyfish,
kangaroo, koala, lady-beetle=ladybug/ladybird, leopard, lion, llama, lobster, monkey, moose, mouse, octopus,
otter, owl, panda, parrot, peacock, penguin, pig, poodle, rabbit, raccoon, rhinoceros=rhino/rhinoceros,
rooster, sauropod=brontosaurus/long-necked dinosaur, scorpion, seal, shark, shrimp, skunk, sloth, snail,
snake, spider, spouting-whale=whale, squid, swan, t-rex=t-rex/dinosaur, tiger, tropical-fish, turkey,
turtle, unicorn, wolf, zebra, phoenix-bird=phoenix, coral, spiral-shell=seashell/shell, spider-web,
paw-prints=paw prints*,

blossom=yellow flower, bouquet, cactus, cherry-blossom, deciduous-tree=tree, evergreen-tree=pine tree,
feather, four-leaf-clover, hibiscus, lotus, maple-leaf, palm-tree, potted-plant, rose, seedling, sunflower,
tulip, christmas-tree, mushroom=red mushroom/toadstool, wood=log, rock,

red-apple, green-apple, avocado, baguette-bread=baguette, banana, beer-mug=mug of beer/beer, bell-pepper,
birthday-cake, blueberries*, bread=loaf of bread/bread, broccoli*, bubble-tea, candy, carrot,
cheese-wedge=piece of cheese/cheese, cherries*, chocolate-bar, cocktail-glass=cocktail, coconut, cookie,
croissant, cup-with-straw=soda/cup with a straw, cupcake, doughnut=donut/doughnut, ear-of-corn=corn cob/ear
of corn, egg, eggplant, french-fries=french fries*, grapes=grapes*, hamburger=burger/hamburger, honey-pot,
hot-beverage=cup of coffee/coffee/hot drink, hot-dog, hot-pepper=chili pepper/chili, ice-cream=bowl of ice
cream, ice=ice cube, kiwi-fruit=kiwi, leafy-green=lettuce, lemon, lime, lollipop, onion, pancakes=pancakes*,
pea-pod, peach, peanuts=peanuts*, pear, pineapple, pizza=slice of pizza/pizza, popcorn*, poultry-leg=chicken
leg/drumstick, pretzel, sandwich, shortcake=slice of cake/cake, soft-ice-cream=ice cream cone/ice cream,
strawberry, sushi*, taco, tangerine=orange fruit/tangerine, teapot, tomato, tropical-drink, waffle,
watermelon, wine-glass=glass of wine, cooking=frying pan, steaming-bowl=bowl of noodles/ramen,
amphora=vase/amphora, bottle-with-popping-cork=champagne bottle, spoon, kitchen-knife=knife,

airplane=plane/airplane, ambulance, automobile=car/red car, bicycle=bicycle/bike, bullet-train, bus, canoe,
delivery-truck=truck, fire-engine=fire truck/fire engine, flying-saucer=ufo/flying saucer, helicopter,
kick-scooter=scooter, locomotive=steam train/locomotive, motor-scooter, motorcycle=motorbike/motorcycle,
passenger-ship=cruise ship, pickup-truck, police-car, racing-car=race car/racing car,
rocket=rocket/spaceship, sailboat, satellite, skateboard, roller-skate, sled, speedboat, taxi, tractor,
anchor, ring-buoy=lifebuoy/ring buoy, wheel,

castle, church, circus-tent, classical-building=temple, factory, ferris-wheel, fountain, house,
japanese-castle, mosque, shinto-shrine=red gate/shrine gate, statue-of-liberty, tent, tokyo-tower=red tower,
carousel-horse, fuel-pump, vertical-traffic-light=traffic light, moai=stone head, desert-island=island,
mountain, volcano, beach-with-umbrella=beach,

cloud, cloud-with-lightning=thundercloud/storm cloud, cloud-with-rain=rain cloud, comet, crescent-moon,
droplet=water drop/droplet, fire=flame/fire, full-moon, globe-showing-europe-africa=planet earth/globe,
high-voltage=lightning bolt/lightning, rainbow, ringed-planet=planet saturn/ringed planet, snowflake,
snowman, star, sun, sun-behind-cloud=sun behind a cloud, tornado, umbrella, water-wave=wave,

abacus, accordion, alarm-clock, axe, backpack, balance-scale, basket, bathtub, battery, bed, bell,
blue-book, bone, boomerang, bow-and-arrow, briefcase, broom, bucket, camera, candle, carpentry-saw=saw,
chair, coin, compass, couch-and-lamp=couch/sofa, crown, crystal-ball, desktop-computer=computer, dna=dna
strand, dress, drum, fire-extinguisher, flashlight=torch/flashlight, gear, gem-stone=diamond/gem,
glasses=glasses*, gloves=gloves*, graduation-cap, guitar, hammer, headphone=headphones*,
high-heeled-shoe=high heel, hiking-boot=boot, hourglass-done=hourglass, jeans*, key, ladder, laptop,
light-bulb, locked=padlock, luggage=suitcase, magnet, magnifying-glass-tilted-left=magnifying glass,
maracas=maracas*, megaphone, microscope, mirror, mobile-phone=phone/mobile phone, money-bag, movie-camera,
musical-keyboard=piano, musical-note, necktie=tie, package=cardboard box/box, paintbrush, pencil,
pick=pickaxe, printer, pushpin, radio, red-paper-lantern=red lantern, ring, running-shoe=sneaker/running
shoe, satellite-antenna=satellite dish, saxophone, scarf, scissors=scissors*, screwdriver, scroll, shield,
shopping-cart, socks=socks*, stethoscope, studio-microphone=microphone, sunglasses=sunglasses*, t-shirt,
telephone, telescope, television=television/tv, toilet, toolbox, toothbrush, top-hat, trumpet, violin, watch,
water-pistol, womans-hat=straw hat, wrench, bomb, robot, ghost, skull, alien-monster=space invader,
red-heart=heart,

american-football, artist-palette=paint palette/palette, balloon, baseball, basketball, bowling=bowling pins*,
boxing-glove, bullseye=target, chess-pawn, diving-mask, fireworks*, fishing-pole, flag-in-hole=golf hole,
framed-picture, game-die=die/dice, ice-hockey=ice hockey stick, ice-skate, jack-o-lantern=pumpkin, joystick,
kite, magic-wand, mirror-ball=disco ball, nesting-dolls=nesting doll, party-popper, performing-arts=theatre
masks*, piata=pinata, ping-pong=table tennis bat, pool-8-ball, puzzle-piece, ribbon, skis=skis*,
soccer-ball=football/soccer ball, sports-medal=medal, teddy-bear, tennis=tennis racket, thread=spool of
thread, trophy, video-game=game controller, volleyball, wrapped-gift=present/gift, yarn=ball of yarn
"""


@dataclass(frozen=True)
class Thing:
    """An object that can be drawn.

    Attributes:
        icon: its name in the icon package.
        nouns: what it may be called; the first is the usual name.
        countable: whether the nouns take the article "a" or "an".
    """

    icon: str
    nouns: tuple[str, ...]
    countable: bool = True


def _parse(entry: str) -> Thing:
    entry = " ".join(entry.split())
    icon, _, nouns = entry.partition("=")
    plural = entry.endswith("*")
    icon = icon.rstrip("*")
    names = nouns.rstrip("*").split("/") if nouns else [icon.replace("-", " ")]
    return Thing(icon, tuple(names), not plural)


OBJECTS: tuple[Thing, ...] = tuple(_parse(entry) for entry in _TABLE.split(","))
