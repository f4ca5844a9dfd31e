"""The words that tools/make_sample_data.py makes its records of: one table a constant, one row a line."""


def rows(text: str) -> list[list[str]]:
    """Returns the lines of a table, each as its cells, which stand between bars."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def words(text: str) -> list[str]:
    """Returns the items of a list written with commas."""
    return [item.strip() for item in text.split(",")]


# ---------------------------------------------------------------------------------------------- word lists

WOMEN = words("Nora, Ines, Mia, Lena, Clara, Ruth, Hana, Priya, Zoe, Alice, Marta, Grace, Leila, Joan, Sofia, Amina")
MEN = words("Tom, Omar, Ben, Felix, Hugo, Ivan, Kofi, Peter, Samir, David, Luis, Karl, Aron, Jonas, Marco, Daniel")
PEOPLE = WOMEN + MEN
SURNAMES = words("Lind, Duarte, Okoye, Marsh, Novak, Patel, Reyes, Stone, Weber, Quinn, Hart, Tanaka, Brandt, Costa")
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
COUNT_WORDS = words("zero, one, two, three, four, five")
COUNTABLES = words("buttons, stamps, marbles, shells, apples, pencils, stickers, coins, cards, lemons, beads, candles")

GROUPS = {name: words(members) for name, members in rows("""
    fruits | apple, pear, banana, grape, mango, pineapple, strawberry, melon, kiwi
    tools | hammer, saw, spanner, drill, chisel, screwdriver, axe, file
    animals | dog, horse, tiger, rabbit, goat, monkey, camel, donkey
    colours | red, blue, green, yellow, purple, brown, grey, black
    vehicles | car, bus, lorry, tram, bicycle, train, van, taxi
    clothes | shirt, coat, scarf, glove, sock, hat, jacket, dress
    pieces of furniture | table, chair, sofa, bed, desk, wardrobe, bookcase, stool
    vegetables | carrot, onion, cabbage, spinach, leek, turnip, potato, celery
    musical instruments | piano, violin, flute, trumpet, drum, guitar, harp, cello
    jobs | nurse, baker, farmer, pilot, teacher, plumber, dentist, tailor
    parts of the body | knee, elbow, shoulder, ankle, thumb, chin, wrist, ear
    drinks | milk, tea, coffee, juice, water, lemonade, cocoa
""")}  # fmt: skip

OPEN_LISTS = rows("""
    animals that can fly | Three animals that can fly are the eagle, the bat and the bee.
    animals that live in the sea | Three animals that live in the sea are the whale, the shark and the crab.
    fruits that are yellow or green | Three fruits that are yellow or green are the banana, the lemon and the pear.
    things found in a kitchen | Three things found in a kitchen are a stove, a sink and a fridge.
    things found in a classroom | Three things found in a classroom are a desk, a map and a board.
    sports played with a ball | Three sports played with a ball are football, tennis and basketball.
    things made of paper | Three things made of paper are a book, a letter and a newspaper.
    things made of glass | Three things made of glass are a window, a bottle and a mirror.
    vehicles with two wheels | Three vehicles with two wheels are a bicycle, a motorbike and a scooter.
    people who work in a hospital | Three people who work in a hospital are a doctor, a nurse and a surgeon.
    things people wear in winter | Three things people wear in winter are a coat, a scarf and gloves.
    months that have 31 days | Three months that have 31 days are January, March and May.
    things that give light | Three things that give light are the sun, a candle and a lamp.
""")

SHOPS = {name: words(goods) for name, goods in rows("""
    bakery | a loaf of rye bread, a cherry tart, six fresh rolls, an apple cake
    hardware shop | a small hammer, a box of nails, a tin of white paint, an oak shelf
    bookshop | a thick cookbook, an old atlas, a book of poems, two travel guides
    garden centre | a young rose bush, a bag of soil, three tomato plants, a green hose
    market | a kilo of onions, a basket of plums, a jar of honey, a wool scarf
""")}  # fmt: skip

SLOTS = {name: words(values) for name, values in rows("""
    town | Leeds, York, Bath, Durham, Exeter, Norwich, Lincoln, Derby, Oxford, Chester, Bristol, Cardiff, Dundee
    day | Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    opening | at eight in the morning, at half past nine in the morning, at ten in the morning, at noon
    closing | at four in the afternoon, at half past five in the afternoon, at six in the evening, at eight at night
    building | art museum, town library, swimming pool, flower market, toy museum, old castle, zoo, science museum
    vehicle | train, bus, coach, early train, night bus
    host | an old friend, a sick uncle, two school friends, a retired teacher, a young cousin, a former neighbour
    job | a baker, a nurse, a pilot, a carpenter, a dentist, an engineer, a librarian, a gardener, an architect
    found | a silver ring, an old coin, a rusty key, a glass bottle, a torn map, a gold watch, a wooden whistle
    while | raking leaves, walking the dog, looking for mushrooms, picking berries, hanging up the washing
    near | behind the garden shed, beside the path, under a pile of stones, near the old oak, next to the gate
    event | school concert, book sale, chess match, spring fair, film evening, cooking class, quiz night, art show
    venue | in the town hall, in the old barn, at the sports club, in the city park, at the village school
    duty | the tickets, the music, the food, the lights, the posters, the chairs
    pet | a grey cat, a small terrier, a white rabbit, a brown spaniel, a black kitten
    petname | Biscuit, Pepper, Smoky, Daisy, Rusty, Clover, Ziggy, Moss
    spot | under the kitchen table, on the piano stool, in a straw basket, behind the sofa, beside the warm stove
    lawn | in the back garden, on the stairs, near the pond, in the long hall, around the apple tree
    contest | baking contest, drawing contest, photo contest, poetry contest, singing contest
    delay | the bus broke down, the alarm clock did not ring, a tree had fallen on the road, the car would not start
    meeting | the staff meeting, the piano lesson, the wedding, the job interview, the first class, the football match
    meal | lunch, supper
    food | bean soup and bread, two boiled eggs, a bowl of rice, a cheese sandwich, a plate of noodles
    drink | a cup of mint tea, a glass of milk, some apple juice, a large coffee, a glass of cold water
    room | on the balcony, in the garden, in the small kitchen, by the window, on the front steps
""")}  # fmt: skip

# Each scene is a passage and its questions; a slot with a 2 is a second, different draw from the same list.
SCENES = [(scene[0], list(zip(scene[1::2], scene[2::2], strict=True))) for scene in rows("""
    {name} bought {thing} at the {shop} in {town} on {day}. {name2} went there on {day2} but bought nothing. \
    | What did {name} buy? | {thing} | Who bought {thing}? | {name} \
    | On which day did {name2} go to the {shop}? | on {day2}
    {name} took the {vehicle} from {town} to {town2} on {day} to visit {host}. \
    | Whom did {name} visit? | {host} | Which town did {name} travel to? | {town2} | When did {name} travel? | on {day}
    While {while}, {name} found {found} {near}. {name2} cleaned it and took it home. \
    | What did {name} find? | {found} | Where was it found? | {near} | Who took it home? | {name2}
    The {building} in {town} opens {opening} and closes {closing}. It stays shut on {day}. \
    | When does the {building} close? | {closing} | When does the {building} open? | {opening} \
    | On which day does the {building} stay shut? | on {day}
    {name} works as {job} in {town}, while {name2} works as {job2} in {town2}. \
    | Which job does {name2} have? | {job2} | Who works as {job}? | {name} \
    | In which town does {name2} work? | in {town2}
    The {event} will take place {venue} on {day}. {name} is in charge of {duty}, and {name2} looks after {duty2}. \
    | Where will the {event} take place? | {venue} | Who is in charge of {duty}? | {name} \
    | What does {name2} look after? | {duty2} | When is the {event}? | on {day}
    {name} has {pet} called {petname}. It sleeps {spot} and plays {lawn}. \
    | Where does {petname} sleep? | {spot} | Where does {petname} play? | {lawn} \
    | What kind of pet is {petname}? | {pet}
    {name} won the {contest} in {town} on {day}. {name2} came second. \
    | Who won the {contest}? | {name} | Who came second? | {name2} | Where was the {contest} held? | in {town}
    {name} was late for {meeting} on {day} because {delay}. {name2} arrived on time. \
    | Why was {name} late? | because {delay} | What was {name} late for? | {meeting} | Who arrived on time? | {name2}
    For {meal} on {day}, {name} had {food} and {drink} {room}. \
    | What did {name} drink? | {drink} | What did {name} eat? | {food} | Where did {name} have {meal}? | {room}
""")]  # fmt: skip

# The review's first sentence, then things to praise or blame: subject / good / bad.
REVIEWS = [(line[0], [[part.strip() for part in cell.split("/")] for cell in line[1:]]) for line in rows("""
    We ate at the new noodle bar. | the soup was / delicious / cold | the waiter was / friendly / rude \
    | the tables were / clean / sticky | the prices were / fair / far too high
    I stayed at this hotel for two nights. | the bed was / soft / lumpy | the staff were / helpful / unkind \
    | the room was / quiet / noisy | the breakfast was / fresh / stale
    I bought this kettle last month. | the handle is / cool / too hot | the lid is / well made / always stuck \
    | the water boils / very quickly / much too slowly | the switch is / solid / already broken
    We saw this film on Friday. | the story was / exciting / dull | the actors were / wonderful / stiff \
    | the jokes were / funny / flat | the ending was / moving / silly
    I have worn these shoes for a week. | the soles are / soft / slippery | the seams are / strong / coming apart \
    | the colour is / lovely / ugly | the fit is / perfect / painfully tight
    I read this novel on holiday. | the plot was / gripping / confusing | the hero was / charming / annoying \
    | the language was / beautiful / clumsy | the chapters were / lively / boring
    We hired a boat for the day. | the engine was / reliable / weak | the seats were / dry / wet \
    | the owner was / patient / impatient | the deck was / spotless / filthy
    I use this app to learn Spanish. | the lessons are / clear / hard to follow | the voices are / natural / harsh \
    | the menus are / simple / a mess | the exercises are / fun / dreary
""")]  # fmt: skip

TOPICS = {line[0]: line[1:] for line in rows("""
    sport | The goalkeeper saved a penalty in the last minute. | Both teams scored twice before half time. \
    | The runner set a new record in the marathon. | She won the final set at the tennis club. \
    | The coach changed two players after the break. | The swimmer touched the wall first and took the gold medal.
    cooking | Stir the onions until they turn soft and brown. | Add a pinch of salt to the boiling water. \
    | The dough must rest for an hour before baking. | Slice the carrots and fry them in butter. \
    | Whisk three eggs with some sugar. | Leave the stew on a low flame until the beans are tender.
    weather | Heavy rain is expected in the north tonight. | The fog will clear by late morning. \
    | Strong winds and snow closed the mountain pass. | It will be sunny and warm all weekend. \
    | Thunder rolled over the valley after a humid day. | A light frost covered the fields at dawn.
    music | The violins play the melody in the second part. | The band recorded eleven songs in a month. \
    | The choir practised the new hymn all evening. | He tuned his guitar before the concert. \
    | The drummer kept a steady beat. | The pianist bowed and played one more waltz.
    travel | Our flight to Madrid leaves from gate nine. | The hotel is a short walk from the beach. \
    | They packed two suitcases and their passports. | We took a night train across the border. \
    | The guide showed the tourists the old harbour. | You can pick up your hire car at the airport.
    health | The doctor told him to rest for three days. | Wash your hands often to avoid catching a cold. \
    | The nurse put a bandage on the wound. | She takes one tablet after every meal. \
    | Regular sleep helps the body to recover. | The dentist found a small hole in his tooth.
    money | The bank raised the interest on savings. | He pays his rent on the first of the month. \
    | The price of bread went up by ten per cent. | She put half of her wages into a savings account. \
    | The shop lowered its prices to attract buyers. | They took out a loan to pay for the house.
    school | The pupils wrote an essay about the sea. | The teacher marked the tests on Sunday. \
    | Our history lesson starts at nine. | The class learned to multiply fractions. \
    | Homework must be handed in by Friday. | She revised all week for the spelling exam.
    gardening | Plant the bulbs in autumn before the first frost. | She pulled the weeds out of the flower bed. \
    | Water the seedlings every evening. | The roses need pruning in early spring. \
    | He spread compost around the bean plants. | Rake the leaves off the lawn and trim the hedge.
    technology | The new phone has a bigger screen and a faster chip. | Restart the computer to finish the update. \
    | The laptop's battery lasts for twelve hours. | He forgot the password of his email account. \
    | The robot maps the room with a laser. | The engineers fixed a bug in the software.
""")}  # fmt: skip

# Base form, form with he or she, past, participle, object.
VERBS = [cell[0].split(maxsplit=4) for cell in rows("""
    bake bakes baked baked the bread
    paint paints painted painted the fence
    write writes wrote written the letter
    sing sings sang sung the song
    wash washes washed washed the car
    clean cleans cleaned cleaned the kitchen
    repair repairs repaired repaired the bicycle
    draw draws drew drawn the map
    cook cooks cooked cooked the soup
    drive drives drove driven the van
    sweep sweeps swept swept the floor
    feed feeds fed fed the horse
    choose chooses chose chosen the music
    break breaks broke broken the ice
    carry carries carried carried the ladder
    fold folds folded folded the paper
    find finds found found the path
    move moves moved moved the piano
""")]  # fmt: skip
MANNERS = words("with great care, before lunch, in the afternoon, without any help, very slowly, after work")

COMMANDS = words("close the window, pass the salt, open the door, turn down the radio, wait outside, call a taxi, "
                 "sign the form, carry this bag, speak more slowly, move your car, take off your shoes, sit down, "
                 "send the report, switch off the light, lend me a pen, show me the way")  # fmt: skip
PLURALS = rows("""
    cat | cats | sleeps | sleep | on the sofa
    child | children | plays | play | in the park
    leaf | leaves | falls | fall | from the tree
    man | men | waits | wait | at the station
    knife | knives | lies | lie | on the table
    baby | babies | cries | cry | at night
    box | boxes | stands | stand | in the corner
    woman | women | works | work | in the garden
    bird | birds | sings | sing | in the morning
    mouse | mice | hides | hide | behind the wall
    bus | buses | stops | stop | near the school
    sheep | sheep | grazes | graze | on the hill
    city | cities | grows | grow | every year
    goose | geese | swims | swim | on the lake
    farmer | farmers | gets up | get up | before dawn
""")  # fmt: skip
INFORMAL = rows("""
    I can't come to the meeting. | I cannot come to the meeting.
    We won't be open on Sunday. | We will not be open on Sunday.
    Thanks a lot for your help. | Thank you very much for your help.
    I'm sorry I didn't write sooner. | I am sorry that I did not write sooner.
    The boss wants to see you. | The manager would like to see you.
    They're gonna build a bridge. | They are going to build a bridge.
    Hi, is Mr Hart around? | Good morning, is Mr Hart available?
    The kids are at school. | The children are at school.
    We've got lots of work. | We have a great deal of work.
    She's fed up with the noise. | She is annoyed by the noise.
    Give me a call tomorrow. | Please telephone me tomorrow.
    I don't get the question. | I do not understand the question.
    It's OK to park here. | It is permitted to park here.
""")  # fmt: skip

# Adjective, its opposite or its synonym, and nouns that go with both.
OPPOSITES = rows("""
    hot | cold | soup, tea, bath
    old | new | bicycle, bridge, carpet
    full | empty | bottle, bus, basket
    wet | dry | towel, grass, coat
    clean | dirty | window, shirt, plate
    open | closed | door, gate, shop
    heavy | light | suitcase, parcel, box
    early | late | train, guest, bus
    loud | quiet | music, engine, crowd
    long | short | film, speech, queue
    strong | weak | rope, bridge, coffee
    easy | difficult | test, puzzle, lesson
    cheap | expensive | hotel, meal, phone
    wide | narrow | street, river, path
    fast | slow | car, runner, boat
    soft | hard | pillow, chair, bread
    deep | shallow | lake, pond, river
    bright | dark | room, kitchen, hall
    smooth | rough | stone, table, wall
    thick | thin | blanket, book, carpet
    safe | dangerous | road, bridge, ladder
    sweet | sour | apple, sauce, juice
""")  # fmt: skip
SYNONYMS = rows("""
    large | big | house, garden, kitchen
    glad | happy | farmer, child, guest
    fast | quick | car, boat, runner
    silent | quiet | house, street, crowd
    clever | smart | child, dog, pupil
    ill | sick | teacher, cat, baker
    simple | easy | test, puzzle, task
    strange | odd | story, noise, dream
    famous | well-known | singer, bridge, painter
    tiny | very small | mouse, house, stone
""")  # fmt: skip
OPENINGS = words("The, My aunt said that the, I noticed that the, Everyone agreed that the, It was clear that the, "
                 "Our guest thought that the, My brother was sure that the, The old man said that the")  # fmt: skip


# Ladders for comparing: each thing has clearly more of it than the thing before.
LADDERS = {more: words(things) for more, things in rows("""
    heavier | a feather, an egg, a brick, a bicycle, a piano, a lorry, a passenger ship
    bigger | an ant, a mouse, a cat, a sheep, a horse, an elephant, a blue whale
    faster | a snail, a tortoise, a bicycle, a fast train, a jet plane, a space rocket
    longer | a second, a minute, an hour, a day, a week, a month, a year, a century
    taller | a daisy, a chair, a door, a house, a lighthouse, a mountain
""")}  # fmt: skip
MEASURES = rows("""
    taller | {a} is {x} cm tall, while {b} is {y} cm tall. | Who is taller, and by how much? | cm | 120 | 190
    older | {a} is {x} years old, while {b} is {y} years old. | Who is older, and by how much? | years | 8 | 60
    heavier | {a} weighs {x} kg, while {b} weighs {y} kg. | Who is heavier, and by how much? | kg | 40 | 90
    faster | {a} ran the race in {y} seconds, while {b} ran it in {x} seconds. | Who was faster, and by how much? \
    | seconds | 20 | 60
""")  # fmt: skip

MERGES = {kind: [cell.split(" / ") for cell in words(pairs)] for kind, pairs in rows("""
    so | was tired / went to bed early, was hungry / made a sandwich, was cold / put on a coat, \
    missed the bus / walked to work, lost the key / climbed through the window, felt ill / stayed at home, \
    needed money / sold the car, needed milk / went back to the shop, broke a leg / stayed in hospital
    but | was tired / stayed up late, has a car / takes the bus, was ill / went to work, likes dogs / has only a cat, \
    trained hard / lost the race, left early / missed the train, studied all night / failed the test, \
    lives near the sea / cannot swim, was invited / did not go
""")}  # fmt: skip
GOODS = words("flour, eggs, sugar, rice, butter, soap, bread, cheese, onions, honey, tea, matches")

UNITS = rows("""
    minutes | hours | 60
    hours | days | 24
    days | weeks | 7
    centimetres | metres | 100
    metres | kilometres | 1000
    grams | kilograms | 1000
    months | years | 12
    seconds | minutes | 60
""")  # fmt: skip
SHOWS = words("film, concert, match, lesson, play, meeting, party, lecture")

DEFINITIONS = rows("""
    an anchor | a heavy metal object that holds a ship in place
    an orchard | a piece of land where fruit trees are grown
    a bakery | a place where bread and cakes are made and sold
    a compass | a tool with a needle that points to the north
    a calendar | a list of the days, weeks and months of a year
    a desert | a dry area of land where very little rain falls
    a dentist | a doctor who takes care of people's teeth
    an island | a piece of land with water all around it
    a library | a place where people can read and borrow books
    a ladder | a tool with steps for climbing up to high places
    a map | a drawing that shows where places are
    a museum | a building where interesting old or valuable things are shown
    a nest | a home that a bird builds for its eggs
    an orphan | a child whose parents have died
    a passport | a small official book that people need to travel abroad
    a pilot | a person who flies an aircraft
    a recipe | a list of steps for cooking a dish
    a rumour | a story that spreads although nobody knows if it is true
    a saddle | a leather seat for the rider of a horse
    a secret | something that only a few people are allowed to know
    a shadow | a dark shape that appears where something blocks the light
    a tailor | a person who makes and mends clothes
    a telescope | a tool that makes distant things look closer
    a thermometer | a tool that measures how hot or cold something is
    a tunnel | a long passage under the ground or through a hill
    an umbrella | a folding cover that keeps off the rain
    a vet | a doctor who takes care of sick animals
    a volcano | a mountain from which hot melted rock can come out
    a wallet | a small flat case for money and cards
    a witness | a person who sees something happen
    a bridge | a structure that carries a road or path over a river or valley
    a candle | a stick of wax with a string that burns to give light
    a castle | a large strong building that was made to keep enemies out
    a century | a period of one hundred years
    a cobbler | a person who mends shoes
    a dam | a wall that is built across a river to hold back water
    a debt | a sum of money that somebody owes
    a diary | a book in which a person writes about each day
    an echo | a sound that is heard again after it bounces off a surface
    a fence | a barrier that is put around a garden or field
    a glacier | a large mass of ice that moves slowly down a valley
    a hammer | a tool with a heavy head for hitting nails
    a harbour | a sheltered place where ships can stop safely
    a hive | a home in which bees live and store honey
    a lighthouse | a tower with a strong light that guides ships
    a mirror | a piece of glass that shows a picture of what is in front of it
    a nurse | a person who takes care of sick people
    an oasis | a place in a desert where there is water
    a stable | a building in which horses are kept
    a twin | one of two children who were born at the same time to the same mother
""")

EXPLANATIONS = rows("""
    do birds build nests | Birds build nests so that their eggs and young are safe and warm.
    does ice float on water | Ice floats because it is less dense than liquid water.
    do people wear helmets on bicycles | People wear helmets because they protect the head in a fall.
    do leaves turn towards the light | Leaves turn towards the light because they need it to make food.
    does a wet towel dry in the sun | A wet towel dries because the sun's heat turns its water into vapour.
    do we see lightning before we hear thunder | We see lightning first because light travels faster than sound.
    do cats have whiskers | Cats have whiskers to feel things near them, even in the dark.
    do ships have lifeboats | Ships have lifeboats so that people can get away safely if the ship sinks.
    does salt melt the ice on a road | Salt melts ice because salty water freezes at a lower temperature.
    do farmers rotate their crops | Farmers rotate crops so that the soil does not lose the same nutrients each year.
    is it colder on high mountains | It is colder there because thin air holds less heat.
    do people put food in a fridge | People keep food in a fridge because germs grow more slowly in the cold.
    do we have leap years | We have leap years because the Earth takes about a quarter of a day more than 365 days.
    do bees visit flowers | Bees visit flowers to collect nectar and pollen for food.
    does bread rise | Bread rises because yeast makes gas bubbles in the dough.
    do metal spoons get hot in soup | Metal spoons get hot because metal carries heat very well.
    do dogs pant in hot weather | Dogs pant because it helps their bodies to lose heat.
    do camels survive long without water | Camels survive because their bodies lose very little water.
    does the moon shine | The moon shines because it reflects the light of the sun.
    do we brush our teeth | We brush our teeth to remove the food and germs that cause decay.
    do trees lose their leaves in autumn | Many trees lose their leaves to save water and energy in winter.
    do tyres have grooves | Tyres have grooves so that water can escape and the wheels grip wet roads.
    do owls hunt well at night | Owls hunt well at night because they have sharp ears and large eyes.
    do people sweat when they run | People sweat because the drying sweat cools the skin.
    is sea water salty | Sea water is salty because rivers wash salts from rocks into the sea.
    do balloons filled with helium rise | Helium balloons rise because helium is lighter than air.
    do houses have chimneys | Houses have chimneys so that smoke can leave the rooms.
    does a mirror steam up in the bathroom | A mirror steams up because warm vapour turns to drops on cold glass.
    do we have day and night | We have day and night because the Earth turns once around itself each day.
    do ducks stay dry in water | Ducks stay dry because their feathers are covered with oil.
    do iron gates rust | Iron gates rust because iron reacts with water and air.
    do bears sleep through the winter | Bears sleep through the winter because there is little food then.
    do we need sleep | We need sleep so that the body and the brain can rest and recover.
    do people boil water before drinking it | People boil water because the heat kills germs.
    do plants need water | Plants need water to make food and to carry nutrients from the soil.
    do rainbows appear | Rainbows appear because raindrops split sunlight into its colours.
    do people wear light clothes in summer | People wear light clothes in summer because they help to keep cool.
    do giraffes have long necks | Giraffes have long necks that help them to eat leaves high up in trees.
    do cars have seat belts | Cars have seat belts to hold people in their seats in a crash.
    do we cook meat | We cook meat to kill germs and to make it easier to chew.
    do polar bears have thick fur | Polar bears have thick fur to stay warm in the cold.
    do onions make us cry | Onions make us cry because cutting them sets free a gas that stings the eyes.
    does a kettle whistle | A kettle whistles because steam is forced out through a small hole.
    do windows have two panes of glass | Windows have two panes because the air between them keeps heat in.
    do magnets stick to a fridge | Magnets stick to a fridge because its door contains iron.
    do we feel lighter in a swimming pool | We feel lighter in a pool because the water pushes us up.
    do people recycle glass | People recycle glass because melting old glass uses less energy than making new glass.
    do fish have gills | Fish have gills so that they can take oxygen from the water.
    do clocks go wrong | Clocks go wrong when their battery is weak or their parts wear out.
    do streets have lamps | Streets have lamps so that people can see and be seen at night.
""")

# Story, question, the operations on the numbers a, b and c in turn, and the statement that answers it.
ONE_STEP = rows("""
    {name} has {a} {things} and gets {b} more. | How many {things} does {name} have now? \
    | plus | {name} has {d} {things} now
    {name} had {a} {things} and gave away {b}. | How many {things} does {name} have left? \
    | minus | {name} has {d} {things} left
    There are {a} boxes with {b} {things} in each box. | How many {things} are there in all? \
    | times | there are {d} {things} in all
    {a} {things} are shared equally among {b} children. | How many {things} does each child get? \
    | divided by | each child gets {d} {things}
    A bus carries {a} people, and {b} of them get off. | How many people stay on the bus? \
    | minus | {d} people stay on the bus
    {name} sorted {a} {things} in the morning and {b} in the afternoon. | How many {things} did {name} sort? \
    | plus | {name} sorted {d} {things}
    One ticket costs {a} pounds, and {name} buys {b} tickets. | How much does {name} pay? \
    | times | {name} pays {d} pounds
    {name} puts {a} chairs into {b} equal rows. | How many chairs are in each row? \
    | divided by | each row has {d} chairs
""")
TWO_STEPS = rows("""
    {name} has {a} bags with {b} {things} in each and then finds {c} more. \
    | How many {things} does {name} have now? | times, plus | {name} has {d} {things} now
    {name} had {a} {things}, bought {b} more and then gave {c} to a friend. \
    | How many {things} does {name} have left? | plus, minus | {name} has {d} {things} left
    {name} saves {b} pounds a week for {a} weeks and then spends {c} pounds. \
    | How much money is left? | times, minus | {d} pounds are left
    {a} pupils and {b} parents sit at {c} tables, with the same number at each. \
    | How many people sit at each table? | plus, divided by | {d} people sit at each table
    A baker makes {a} trays of {b} rolls and sells {c} rolls. \
    | How many rolls are left? | times, minus | {d} rolls are left
    {name} reads {a} pages on Monday, {b} on Tuesday and {c} on Wednesday. \
    | How many pages does {name} read? | plus, plus | {name} reads {d} pages
    A bus carries {a} people. At the next stop {b} get off and {c} get on. \
    | How many people are on the bus now? | minus, plus | {d} people are on the bus now
    A shop has {a} eggs, but {b} break. The rest are put into {c} equal boxes. \
    | How many eggs are in each box? | minus, divided by | each box has {d} eggs
""")
# Story, question, and the reasons for yes (a is greater than b) and for no (a is less than b).
CHECKS = rows("""
    {name} is {a} years old. Members of the {club} club must be older than {b}. | May {name} join the club? \
    | {name} is {a}, which is more than {b} | {name} is {a}, which is less than {b}
    A ticket for the {show} costs {b} pounds. {name} has {a} pounds. | Can {name} buy a ticket? \
    | {a} pounds is more than {b} pounds | {a} pounds is less than {b} pounds
    The box holds {a} {things}. {name} wants to pack {b} {things} into it. | Will all the {things} fit? \
    | the box holds {a} and {name} has only {b} | the box holds only {a} and {name} has {b}
    The bus leaves in {a} minutes. {name} needs {b} minutes to reach the stop. | Will {name} catch the bus? \
    | {b} minutes is less than {a} minutes | {b} minutes is more than {a} minutes
    {name} lives {a} km from the sea, and {other} lives {b} km from it. | Does {name} live further away than {other}? \
    | {a} km is more than {b} km | {a} km is less than {b} km
    {name} scored {a} points in the quiz. Everyone with more than {b} points passed. | Did {name} pass the quiz? \
    | {a} points is more than {b} points | {a} points is less than {b} points
""")
CLUBS = words("chess, running, sailing, film, climbing, rowing, dance")
