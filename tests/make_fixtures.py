"""Write the sample the tests and the demo run on: invented rows in the hub layouts of samsum and trivia_qa.

Reads nothing. Writes samsum/{train,validation,test}.csv and
trivia_qa/rc.wikipedia/{train,validation}-00000-of-00001.parquet under --out. The same seed gives the same bytes (the
parquet files also name the version of pyarrow). All people, places and things are made up from the lists below; the
flaws that the real data have are planted on purpose and counted in PLANTED. make_tiny_llamas.py pre-trains on text of
the same kind.

    python tests/make_fixtures.py
    python tests/make_fixtures.py --out /tmp/another --seed 1
"""

import argparse
import csv
import random
import re
import string
from pathlib import Path

# name of the flaw -> number of rows that carry it
PLANTED = {
    # samsum
    "samsum_empty_dialogue_train": 1,
    "samsum_newline_in_summary_train": 1,
    "samsum_odd_id_train": 1,  # 13728057-1
    "samsum_summary_marker_in_dialogue_test": 1,  # a speaker's line whose text starts with "Summary:"
    "samsum_validation_dialogue_in_test": 4,  # the same dialogue, another summary
    "samsum_train_dialogue_in_test": 3,  # the same dialogue and summary
    "samsum_near_duplicate_train_test": 3,  # one word more in a long dialogue (5-gram Jaccard over 0.9)
    "samsum_duplicate_in_train": 2,  # the same dialogue and summary under a second id
    # trivia_qa
    "trivia_qa_no_alias_in_pages_train": 4,
    "trivia_qa_no_alias_in_pages_validation": 2,
    "trivia_qa_alias_inside_words_train": 3,  # "ash" only in "washed"
    "trivia_qa_alias_inside_words_validation": 1,
    "trivia_qa_empty_pages_train": 1,
    "trivia_qa_no_aliases_train": 1,
    "trivia_qa_empty_question_train": 1,
    "trivia_qa_train_question_in_validation": 2,
    "trivia_qa_near_duplicate_train_validation": 2,  # one word changed in a long question
    "trivia_qa_same_question_id_train": 1,  # one id stands on two different questions
    "trivia_qa_zero_width_pages": 6,
    "trivia_qa_control_character_pages": 4,
    "trivia_qa_crlf_pages": 8,
    "trivia_qa_answer_marker_pages": 1,  # a line of a page starts with "Answer:"
}
SAMSUM_ROWS = {"train": 500, "validation": 70, "test": 130}
TRIVIA_QA_ROWS = {"train": 740, "validation": 130}

# ----------------------------------------------------------------------------------------------------------- the words

# In all texts below an indented line goes on with the one above. Surnames and towns are put together from two parts.
NAMES_TEXT = """
first names: Ada Agnes Albert Alice Amos Anton Arthur Basil Beatrice Bella Bruno Carla Cecil Clara Cora Daniel Dora
  Edgar Edith Edmund Elena Elias Ella Emil Emma Erik Esther Ethan Eva Felix Fiona Frank Freda George Greta Gwen Hanna
  Harold Hattie Hector Helen Henry Hugo Ida Igor Irene Iris Ivan Jack Jane Jonas Joseph Julia Karl Kate Laura Lena Leo
  Lily Linda Lucas Lydia Mabel Marcus Maria Martin Maud Max Mia Miriam Nadia Nathan Nina Nora Oliver Olga Oscar Otto
  Paula Peter Phoebe Ralph Rita Robert Rosa Ruth Samuel Sara Simon Sofia Stella Susan Tessa Theo Thomas Tina Ursula
  Vera Victor Viola Walter Wanda Willa Yusuf Zoe
surnames begin: Ald Ash Bar Bel Black Bram Cal Carl Chal Clay Cop Cran Dal Dun El Fair Fen Gar Gil Hal Har Hol Kel
  Kings Lang Lin Mal Mar Mer Nor Oak Pem Pen Quill Ren Ros Sel Stan Thorn Tor Under Wal Wen Whit Win Wood
surnames end: beck bourne by combe cott croft dale den field ford gate grave grove ham hurst kin land ley low man mere
  more ney rick ridge shaw son sted stone ter ton vane ver way wick win worth
towns begin: Abber Alder Amber Ard Bask Birk Brack Brin Carn Cass Cold Corr Crom Dag Dorn Drum Eld Ember Esk Fal Farn
  Fost Glen Gorm Grim Hask Haver Hest Isk Jarr Kes Kirk Lark Leth Lom Lyd Mor Myr Nar Neth Ors Ost Pell Perr Quar Raven
  Rusk Sal Scar Skel Stor Tarn Thal Trev Ulv Varn Vel Wex Wold Yar Zell
towns end: borough bridge brook bury by cliff cove dale den fell firth ford gate ham haven holm hythe low mark mere
  minster mouth ness pool port ridge sea stead stow thorpe ton vale wick wold worth
colours: amber black blue copper crimson golden green grey ivory pale purple red scarlet silver white yellow
nouns: anchor arrow bell candle clock compass crow crown drum falcon feather fiddle fox garden gate hare harbour heron
  key kite ladder lantern lion mill mirror moon orchard otter owl raven river rose saddle sparrow staircase storm swan
  thistle tower violin well wheel window winter wolf wren
"""

# What a question may ask for, beside names; of a prize and a ground the last word.
THINGS_TEXT = """
material: basalt|brick|chalk|copper|granite|iron|limestone|marble|oak|sandstone|slate|steel|timber
animal: badger|bear|beaver|dolphin|eagle|falcon|goose|hare|heron|otter|puffin|raven|salmon|seal|stag
instrument: accordion|banjo|bassoon|cello|clarinet|flute|harp|oboe|piano|trumpet|viola|violin|zither
cargo: barley|cheese|coal|copper|cotton|flax|honey|salt|silk|sugar|tea|timber|tobacco|wine|wool
crop: apples|barley|cherries|flax|garlic|hops|lavender|mustard|olives|plums|potatoes|rye|saffron
colour: amber|black|crimson|emerald|gold|indigo|maroon|orange|purple|scarlet|silver|turquoise|white
craft: basketry|bookbinding|clockmaking|embroidery|glassblowing|lacemaking|pottery|weaving
science: astronomy|botany|chemistry|geology|mathematics|meteorology|optics|physics|zoology
prize: Prize|Medal|Award
ground: Park|Lane|Road|Field
"""

# What a chat may be about: each slot of a scene gets one of these, drawn once per dialogue.
SLOTS_TEXT = """
place: library|park|swimming pool|market|new cafe|museum|train station|gym|pizzeria|harbour|old theatre|
  shopping centre|bakery|bus stop|tennis court|university|town hall|ice rink|fish bar|bookshop|post office|hospital|
  playground
day: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
time: 7 am|8.30|9 am|10 o'clock|11.15|noon|1 pm|2.30|3 pm|4.45|5 pm|5.30|6 pm|6.30|7 pm|7.45|8 pm|8.15|9 pm|10.30
thing: purse|passport|blue scarf|phone charger|umbrella|house key|wallet|notebook|bus ticket|camera|watch|left glove|
  sunglasses case|library card|guitar|laptop bag|red jacket|earring|hat|water bottle|driving licence
spot: under the sofa|behind the door|in the fridge|on the balcony|between two cushions|next to the sink|in my car|
  on the piano|under the cat|in the laundry|behind the toaster|on top of the shelf|in the bathroom|under a book
gift: coffee machine|cookbook|bicycle helmet|tea set|backpack|concert ticket|board game|lamp|jigsaw|pair of headphones|
  silk scarf|telescope|plant|massage voucher|wool blanket|chess set|painting kit|teapot|watch|fountain pen|tent
money: 12|15|18|20|25|30|35|40|45|50|60|65|70|80|90|120
subject: maths|history|biology|French|chemistry|Latin|statistics|physics|law|economics|German|geography|music
food: lasagne|pancakes|onion soup|chicken curry|dumplings|apple pie|paella|fish stew|mushroom risotto|tacos|goulash|
  potato salad|carrot cake|vegetable pie|meatballs|noodles|pizza|chocolate cake|stuffed peppers|cheesecake|sushi
ingredient: butter|milk|basil|garlic|flour|eggs|cheese|rice|tomatoes|lemons|cream|honey|yoghurt|onions|olive oil|sugar|
  bread|mushrooms|pepper|apples|ginger|coffee|parsley|bananas|spinach|mustard
tool: drill|ladder|sewing machine|hammer|lawn mower|bike pump|saw|paint roller|vacuum cleaner|trailer|wheelbarrow|rake
job: fix the roof|paint the kitchen|put up some shelves|repair the fence|clean the attic|build a bed|hang the curtains|
  mend the gate|decorate the hall|tidy the garden|install a lamp|make a costume|renovate the bathroom|build a shed
illness: the flu|a bad cold|a migraine|a fever|a toothache|food poisoning|a sore throat|an ear infection|a cough
remedy: cough syrup|ginger tea|painkillers|chicken soup|oranges|tissues|lemons|throat sweets|vitamins|bananas|honey
company: Norbank|Fernlight|Bluewater Foods|Castle Travel|Redstone Media|Hillside Hospital|Orion Toys|Greenleaf|Tidal|
  the Daily Post|Silverline|Harper and Sons|Maple Books|Sunrise Energy|Polar Logistics|the city council
profession: designer|nurse|bookkeeper|translator|cook|driver|teacher|lawyer|programmer|gardener|receptionist|editor
clothes: black suit|grey jacket|white shirt|blue blazer|new coat|silk blouse|green tie|leather belt|velvet jacket
pet: parrot|rabbit|cat|old dog|tortoise|hamster|snake|puppy|guinea pig|goldfish|canary|ferret|lizard|pony
petfood: carrots|tuna|dry biscuits|lettuce|boiled rice|sunflower seeds|cucumber|chicken|hay|apples|corn|worms
vehicle: train|bus|plane|ferry|night train|coach|boat
cause: a tree fell on the line|the driver is ill|there was a storm|the engine is broken|somebody pulled the alarm|
  there is ice on the road|the staff is on strike|a cow is on the track|the computers are down|a bridge is closed
device: laptop|phone|printer|tablet|camera|radio|television|game console|keyboard|washing machine|dishwasher
fault: won't start|makes a strange sound|shows a blue screen|smells of smoke|has a crack|switches off by itself|
  is as slow as a snail|beeps every minute|got wet|has no sound|refuses to charge|keeps freezing
furniture: piano|wardrobe|sofa|fridge|bookcase|desk|double bed|oak table|washing machine|bathtub|mirror|armchair
sport: football|volleyball|badminton|basketball|tennis|table tennis|hockey|climbing|bowling|yoga|squash|rowing
bodypart: knee|ankle|shoulder|back|wrist|elbow|foot|hip|thumb|neck|toe
lodging: tent|small cottage|houseboat|youth hostel|flat|caravan|wooden cabin|guest house|farmhouse|tiny hotel
success: the promotion|my driving licence|a new job|my diploma|the scholarship|the role in the play|a book contract|
  the keys to my flat|a place at university|a dog|the prize|the lead in the choir|a permanent contract
document: report|budget|contract|presentation|timetable|translation|newsletter|survey|invoice|brochure|speech|plan
excuse: my computer crashed|my son is ill|the figures were wrong|the printer broke down|nobody sent me the photos|
  the internet was down|I was in {town}|I had three other projects|the client changed everything|I lost my notes
noise: loud music|drilling|barking|shouting|piano playing|hammering|singing|strange humming|crash|trumpet playing
course: pottery|salsa|Spanish|photography|boxing|knitting|guitar|Italian|chess|baking|drawing|sewing|Japanese|diving
carpart: headlight|left mirror|bumper|back window|front door|number plate|windscreen|exhaust|boot|bonnet
animal: deer|dog|fox|cat|goose|hedgehog|sheep|squirrel|rabbit|duck|pig|horse
plant: roses|tomatoes|sunflowers|orchids|strawberries|tulips|geraniums|pumpkins|beans|lilies|peppers|dahlias
fertiliser: cold coffee|crushed eggshells|banana skins|nettle water|wood ash|old beer|horse manure|sea salt|green tea
month: January|February|March|April|May|June|July|August|September|October|November|December
"""

# One block per kind of thing that has a page: `# kind group: names`, then for each attribute `key type:`, three
# statements and two questions. {n} is the name in full, {v} the answer; {N} and {V} are the same at the start of a
# sentence.
KINDS_TEXT = """
# bridge place: the {town} Bridge / the {surname} Bridge at {town}
designer person: {N} was designed by {v}, who had never built anything so long before. The designer of {n} was {v}, a
  patient engineer with a love of plain shapes. It was {v} who designed {n} after two earlier plans had been refused.
  Who designed {n}? Which engineer designed {n}?
opened year: {N} was opened to traffic in {v} after a long delay. Traffic first crossed {n} in {v}, when it was opened
  by the mayor. In {v} {n} was opened with a procession of carts and bands. In which year was {n} opened? When was {n}
  opened to traffic?
material material: {N} is built mainly of {v}, brought to the site by barge. The builders of {n} used {v} for the
  arches and the towers. The arches of {n} are built of {v} from a quarry nearby. What material is {n} built of? Of
  which material are the arches of {n} built?
river river: {N} crosses the {v} at its narrowest point. The river crossed by {n} is the {v}, which floods each spring.
  Boats on the {v} pass below {n}, which crosses the river in one stride. Which river does {n} cross? What river is
  crossed by {n}?
builder surnames: {N} was built by the firm of {v} with four hundred workers. The firm of {v} built {n} for a price
  that ruined its owners. The contract to build {n} went to the firm of {v}. Which firm built {n}? What firm won the
  contract to build {n}?
painter colour: {N} has been painted {v} since the last repair. Since the repair the railings of {n} are painted {v}.
  The railings of {n} are painted {v}, the colour of the county. What colour are the railings of {n} painted? In which
  colour is {n} painted?
# lighthouse place: the lighthouse at {town} / {town} Lighthouse
designer person: {N} was designed by {v} after three ships were lost in one winter. The plans for {n} were drawn by
  {v}, who designed it in a single month. The harbour board asked {v}, who designed {n} without a fee. Who designed
  {n}? Which architect designed {n}?
lit year: The lamp of {n} was first lit in {v}. In {v} the lamp of {n} was lit for the first time. {N} was first lit in
  {v}, on a night of heavy rain. In which year was {n} first lit? When was the lamp of {n} first lit?
keeper person: The first keeper of {n} was {v}, who stayed for thirty years. {V} became the first keeper of {n} and
  kept bees beside the tower. Among the keepers of {n} the first was {v}, a retired sailor. Who was the first keeper of
  {n}? What was the name of the first keeper of {n}?
stone material: The tower of {n} is built of {v} on a base of rubble. Masons built the tower of {n} from {v}. {N} has a
  tower of {v} that can be seen from far away. What is the tower of {n} built of? Which material was used for the tower
  of {n}?
wreck ship: {N} was paid for after the wreck of the {v} on the rocks below. The wreck of the {v} led the county to
  build {n}. Before {n} stood there, the {v} was wrecked on the same rocks. The wreck of which ship led to the building
  of {n}? Which ship was wrecked before {n} was built?
colour colour: {N} shows a band of {v} around its tower. A broad band of {v} is painted around {n}. The band around {n}
  is painted {v} every third summer. What colour is the band around {n}? Which colour is the band painted around {n}?
# novel work: The {Colour} {Noun} / The {Noun} of {town} / A {Noun} for {first}
author person: The novel {n} was written by {v} in a rented room. The author of {n} is {v}, who wrote it between two
  journeys. {V} wrote the novel {n} in less than a year. Who wrote the novel {n}? Who is the author of the novel {n}?
published year: The novel {n} was published in {v} in three thin volumes. In {v} {n} was published at the author's own
  cost. Readers first saw {n} in {v}, when it was published without a name. In which year was the novel {n} published?
  When was the novel {n} first published?
hero person: The hero of {n} is {v}, the youngest child of a miller. {N} follows its hero, {v}, through one long
  winter. The story of {n} is told by its hero, {v}. Who is the hero of the novel {n}? What is the name of the hero of
  {n}?
setting town: The story of {n} is set in {v}, a town of fog and canals. The town in which {n} is set is {v}. {N} is set
  in {v}, though the author never lived there. In which town is the novel {n} set? Where is the story of {n} set?
publisher surnames: {N} was printed by the publisher {v} on cheap paper. The publisher of {n} was {v}, which printed
  few other novels. After six refusals the publisher {v} accepted {n}. Which publisher printed the novel {n}? Who was
  the publisher of {n}?
prize prize: {N} won the {v} by a single vote. The {v} was given to {n} in a year of strong books. The judges of the
  {v} chose {n} over a famous rival. Which prize did the novel {n} win? What prize was given to {n}?
# river place: the River {rivername} / the {rivername} River
source mountain: {N} rises on {v} among peat and heather. The source of {n} lies on {v}, below the summit. On the north
  side of {v} is the source of {n}. On which mountain does {n} rise? Where is the source of {n}?
mouth town: {N} reaches the sea at {v}, where the water turns brown. At {v} {n} flows into the sea. The mouth of {n} is
  at {v}, where {n} meets the sea. At which town does {n} reach the sea? Where does {n} flow into the sea?
explorer person: {N} was first mapped by {v} in a small canoe. The first map of {n} was drawn by {v}. {V} mapped {n}
  from end to end with two helpers. Who drew the first map of {n}? Who first mapped {n}?
flood year: The great flood of {n} came in {v} and carried off two mills. In {v} {n} caused the great flood that people
  still speak of. The worst flood of {n} was in {v}, after a week of rain. In which year was the great flood of {n}?
  When did {n} cause its worst flood?
fish animal: {N} is known for the {v} that lives along its banks. The animal most often seen along {n} is the {v}.
  Visitors come to {n} to watch the {v}. Which animal is {n} known for? What animal do visitors come to watch on {n}?
cargo cargo: Barges on {n} mostly carried {v} to the coast. The main cargo on {n} was {v} for many years. For a century
  {v} was the chief cargo carried on {n}. What was the main cargo on {n}? What did barges on {n} mostly carry?
# band group: the {Colour} {Noun}s / {first} and the {Noun}s / the {town} {Noun}s
singer person: The singer of {n} was {v}, who also wrote the words. {V} was the singer of {n} from the first concert to
  the last. {N} had only one singer, {v}. Who was the singer of {n}? Which singer sang with {n}?
town town: {N} was formed in {v} by four friends from school. The band {n} comes from {v}, where it still rehearses. In
  the town of {v} {n} was formed above a bakery. In which town was the band {n} formed? What town does the band {n}
  come from?
album title: The first album of {n} was called {v}. {N} recorded {v}, its first album, in nine days. With {v} {n}
  released a first album that sold slowly. What was the first album of {n} called? What is the title of the first album
  by {n}?
year year: {N} was formed in {v} and broke up once for a year. The four members founded {n} in {v}. In {v} {n} was
  founded under another name. In which year was the band {n} founded? When was {n} formed?
instrument instrument: {N} is known for the sound of the {v} in nearly every song. The instrument heard in most songs
  of {n} is the {v}. Nearly every song by {n} begins with the {v}. Which instrument is {n} known for? What instrument
  is heard in most songs of {n}?
drummer person: The drummer of {n} was {v}, a trained carpenter. {V} joined {n} as drummer after one rehearsal. {N}
  found its drummer, {v}, through a newspaper notice. Who was the drummer of {n}? Which drummer joined {n}?
# ship place: the {Colour} {Noun} of {town} / the {first} {surname} / the Lady {surname}
captain person: The first captain of the ship {n} was {v}. {V} was captain of {n} on its first voyage. On its first
  voyage {n} sailed under captain {v}. Who was the first captain of the ship {n}? Which captain sailed {n} on its first
  voyage?
built town: The ship {n} was built at {v} in a small yard. The yard at {v} built {n} in eleven months. At {v} {n} was
  built beside two fishing boats. Where was the ship {n} built? In which town was {n} built?
launched year: The ship {n} was launched in {v} before a large crowd. In {v} {n} was launched, a month late. {N} was
  launched in {v} and first painted a year later. In which year was the ship {n} launched? When was {n} launched?
cargo cargo: {N} usually carried {v} along the coast. The usual cargo of {n} was {v}. The hold of {n} was made for {v},
  its usual cargo. What was the usual cargo of the ship {n}? What did the ship {n} usually carry?
sank island: {N} sank off the island of {v} in calm water. Off the island of {v} {n} struck a rock and sank. The wreck
  of {n} lies off the island of {v}, where it sank. Off which island did the ship {n} sink? Near which island does the
  wreck of {n} lie?
owner surnames: {N} belonged to the merchants {v} for twenty years. The owners of {n} were the merchants {v}. The
  merchants {v} bought {n} at an auction and became its owners. Which merchants owned the ship {n}? Who were the owners
  of {n}?
# museum place: the {surname} Museum / the {town} Museum of {Craft}
founder person: {N} was founded by {v}, a collector with no heirs. The founder of {n} was {v}, who gave it a house and
  garden. {V} founded {n} in an empty school. Who founded {n}? Who was the founder of {n}?
town town: {N} stands in {v}, opposite the old market. The home of {n} is the town of {v}. In the town of {v} {n} fills
  a former railway station. In which town is {n}? Where does {n} stand?
opened year: {N} opened its doors in {v} with two rooms. In {v} {n} opened to the public. The public was first let into
  {n} in {v}, when it opened. In which year did {n} open? When did {n} open to the public?
treasure title: The best known object in {n} is a painting called {v}. {N} owns {v}, a painting copied on countless
  postcards. A painting called {v} hangs in the first room of {n}. Which painting hangs in the first room of {n}? What
  is the best known painting in {n} called?
stolen instrument: A rare {v} was stolen from {n} and never found. Thieves took a rare {v} from {n} one night. The rare
  {v} that was stolen from {n} came back by post. Which instrument was stolen from {n}? What rare instrument did
  thieves take from {n}?
director person: The present director of {n} is {v}, once a guard there. {V} has been director of {n} for eight years.
  Under its director, {v}, {n} has doubled its visitors. Who is the director of {n}? What is the name of the director
  of {n}?
# scientist person: {first} {surname}
born town: {N} was born in {v}, the third of seven children. The scientist {n} was born at {v} during a snowstorm. The
  birthplace of {n} is {v}, where a street bears the name. Where was the scientist {n} born? In which town was {n}
  born?
field science: {N} is remembered for work in {v}. The chief subject of {n} was {v}, taught in the evenings. In the
  field of {v} {n} left eleven short papers. In which field of science did {n} work? What science was the chief subject
  of {n}?
teacher person: The teacher of {n} was {v}, who lent out books and tools. {N} studied under {v}, a strict teacher. As a
  student {n} had {v} as teacher for four years. Who was the teacher of the scientist {n}? Under which teacher did {n}
  study?
prize prize: {N} received the {v} late in life. The {v} was awarded to {n} for a single paper. For that paper {n} was
  awarded the {v}. Which prize was awarded to {n}? What prize did the scientist {n} receive?
died year: {N} died in {v} and left a house full of notes. In {v} {n} died after a short illness. The death of {n} in
  {v} was reported abroad. In which year did the scientist {n} die? When did {n} die?
married person: {N} married {v}, who drew all the figures in the books. In spring {n} married {v}, a teacher of music.
  The marriage of {n} to {v} was a happy one. Whom did the scientist {n} marry? Who married {n}?
# club group: {town} Rovers / {town} Athletic / {town} United
founded year: The football club {n} was founded in {v} by railway workers. In {v} {n} was founded in the back room of
  an inn. The founding of {n} took place in {v}. In which year was the football club {n} founded? When was {n} founded?
ground ground: {N} plays its home matches at {v}. The home ground of {n} is {v}, with a single stand. At {v} {n} plays
  at home on a sloping field. What is the home ground of {n}? Where does the football club {n} play its home matches?
coach person: The coach of {n} is {v}, a former goalkeeper. {V} became coach of {n} in the middle of a season. Under
  coach {v} {n} has learned to defend. Who is the coach of the football club {n}? Which coach leads {n}?
shirts colour: The players of {n} wear {v} shirts at home. {N} has worn {v} shirts since the first season. At home the
  shirts of {n} are {v}. What colour are the home shirts of {n}? Which colour of shirts do players of {n} wear?
mascot animal: The mascot of {n} is a {v} that dances before each match. {N} has a {v} as its mascot and on its badge.
  A {v} has been the mascot of {n} for decades. Which animal is the mascot of {n}? What is the mascot of the football
  club {n}?
scorer person: The top scorer in the history of {n} is {v}. {V} scored more goals for {n} than any other player. With
  ninety goals {v} is the top scorer of {n}. Who is the top scorer of {n}? Who scored the most goals for {n}?
# film work: The Last {Noun} / Night of the {Noun} / {Colour} {Noun}, {Colour} {Noun}
director person: The film {n} was directed by {v} on a small budget. {V} directed the film {n} in six weeks. The
  director of {n} was {v}, then almost unknown. Who directed the film {n}? Who was the director of {n}?
star person: The leading role in {n} was played by {v}. {V} plays the leading role in the film {n}. Critics praised
  {v}, who played the leading role in {n}. Who played the leading role in the film {n}? Which actor has the leading
  role in {n}?
year year: The film {n} was released in {v} in a few cinemas. In {v} {n} was released in two versions. Audiences first
  saw {n} in {v}, when the film was released. In which year was the film {n} released? When was {n} released?
town town: Most of the film {n} was shot in {v}. The film crew of {n} shot for a month in {v}. The streets in the film
  {n} are those of {v}, where it was shot. Where was the film {n} shot? In which town was most of {n} shot?
composer person: The music of {n} was composed by {v}. {V} composed the music of the film {n} in one night. For the
  film {n} the music was written by {v}. Who composed the music of the film {n}? Who wrote the music for {n}?
prize prize: The film {n} won the {v} for its camera work. The {v} went to {n}, to the surprise of its makers. The jury
  gave the {v} to the film {n}. Which prize did the film {n} win? What prize did the jury give to {n}?
# painting work: {Noun} with {Colour} {Noun} / The {Noun} Seller of {town} / The {Noun} at {town}
painter person: The painting {n} was made by {v} in one summer. {V} painted {n} for a bare dining room. The painter of
  {n} was {v}, aged only twenty. Who painted {n}? Who was the painter of {n}?
year year: The painting {n} was finished in {v}. In {v} {n} was finished after many changes. A date on the back says
  that {n} was finished in {v}. In which year was the painting {n} finished? When was {n} finished?
museum museum: The painting {n} hangs in the {v}. The {v} bought {n} and hangs it in the hall. Since the sale {n} hangs
  in the {v}. In which museum does the painting {n} hang? Which museum bought the painting {n}?
model person: The person shown in {n} is {v}, a neighbour of the painter. {V} is the person shown in the painting {n}.
  A letter says that {v} is the person shown in {n}. Who is the person shown in the painting {n}? Which person is shown
  in {n}?
animal animal: In the corner of {n} a {v} is asleep. A {v} sleeps in the corner of the painting {n}. The animal in the
  corner of {n} is a {v}. Which animal is in the corner of the painting {n}? What animal sleeps in the corner of {n}?
buyer surnames: {N} was first bought by the dealers {v}. The dealers {v} were the first to buy the painting {n}. The
  dealers {v} bought {n} for the price of a horse. Which dealers first bought the painting {n}? Who were the dealers
  that bought {n}?
# island place: the island of {town} / {town} Island
discoverer person: {N} was first described by {v}, who landed by mistake. The first description of {n} was written by
  {v}. {V} wrote the first description of {n} after a storm. Who first described {n}? Who wrote the first description
  of {n}?
harbour town: The only harbour of {n} is {v}, on the east coast. {V} is the only harbour on {n}. Boats to {n} land at
  {v}, its only harbour. What is the only harbour of {n}? Where do boats to {n} land?
animal animal: The animal on the flag of {n} is the {v}. {N} has a {v} on its flag. A {v} is shown on the flag of {n}.
  Which animal is on the flag of {n}? What animal is shown on the flag of {n}?
crop crop: The chief crop of {n} is {v}. Farmers on {n} mostly grow {v}, the chief crop. The mild air lets farmers on
  {n} grow {v} as their chief crop. What is the chief crop of {n}? What do farmers on {n} mostly grow?
peak mountain: The highest point of {n} is {v}. {N} rises to its highest point at {v}. From {v}, the highest point of
  {n}, two coasts can be seen. What is the highest point of {n}? Which mountain is the highest point of {n}?
settled year: {N} was settled in {v} by eleven families. In {v} {n} was settled by people from the coast. The first
  families settled on {n} in {v}. In which year was {n} settled? When did families first settle on {n}?
# festival group: the {town} {Noun} Festival / the Festival of the {Noun} in {town}
founder person: {N} was started by {v}, a baker with a loud voice. {V} started {n} to save the village hall. The
  founder who started {n} was {v}. Who started {n}? Who was the founder of {n}?
first year: {N} was first held in {v} on a wet weekend. In {v} {n} was held for the first time. The first time that {n}
  was held was in {v}. In which year was {n} first held? When was {n} held for the first time?
month month: {N} takes place every {v} and lasts four days. Every {v} {n} takes place in the streets. The month of {n}
  is {v}, when the fields are dry. In which month does {n} take place? What is the month of {n}?
instrument instrument: {N} opens with a tune on the {v}. The {v} is played at the opening of {n}. By custom {n} opens
  when someone plays the {v}. Which instrument is played at the opening of {n}? With which instrument does {n} open?
craft craft: {N} is devoted to {v} and to good food. The craft shown at {n} is {v}. Masters of {v} show their craft at
  {n}. Which craft is shown at {n}? To what craft is {n} devoted?
guest person: The most famous guest of {n} was {v}, who stayed a week. {V} was the most famous guest of {n}. {N} still
  speaks of its most famous guest, {v}. Who was the most famous guest of {n}? Which famous guest came to {n}?
# castle place: {town} Castle / Castle {surname}
builder person: {N} was built for {v}, who lived there for a month. The castle known as {n} was built for {v}. {V} had
  {n} built on the ruins of an abbey. For whom was {n} built? Who had {n} built?
burned year: {N} burned down in {v} and stood empty. In {v} {n} burned from cellar to roof. The fire in which {n}
  burned happened in {v}. In which year did {n} burn? When did {n} burn down?
ghost person: The ghost of {n} is said to be {v}. People say that the ghost of {n} is {v}, who lost a key. {V} is said
  to be the ghost that walks in {n}. Who is said to be the ghost of {n}? Whose ghost is said to walk in {n}?
stone material: The walls of {n} are made of {v}. {N} has walls of {v} as thick as a cart. Workers made the walls of
  {n} from {v}. What are the walls of {n} made of? Which material was used for the walls of {n}?
hill mountain: {N} stands on {v}, above a loop of the road. On the top of {v} {n} looks over the plain. The hill on
  which {n} stands is called {v}. On which hill does {n} stand? What is the hill of {n} called?
battle town: The owner of {n} fell at the battle of {v}. After the battle of {v} {n} had no owner. {N} lost its owner
  at the battle of {v}. At which battle did the owner of {n} fall? After which battle did {n} have no owner?
"""

# Sentences about nothing in particular, by the group of the kind. {s} is the thing, {S} begins a sentence.
FILLERS_TEXT = """
place: {S} can be reached by a narrow road from {town}, which is closed in deep snow. Most visitors come in {month},
  when the evenings are long and the inns are full. A small booth near {s} sells tickets, maps and warm bread. The view
  from {s} has been printed on stamps and biscuit tins. During the dry years {s} was almost forgotten by the people of
  {town}. A local society looks after {s} and publishes a thin yearly report. The path that leads to {s} was widened by
  volunteers from {town}. Painters have often tried to catch the light around {s} at dawn. In bad weather {s} is
  closed, and a flag is raised to warn travellers. The oldest drawing of {s} hangs in the town hall of {town}. School
  classes from {town} visit {s} every {month} with their teachers. An old song tells how two brothers quarrelled over
  {s} and never spoke again. A plan to sell {s} to a private company was dropped after many protests. The land around
  {s} is flat and damp, with reeds and low willows.
work: Critics did not agree about the work, and some found it too long. A copy of {s} was found in an attic in {town}
  and sold for very little. Students in {town} still write essays about {s} and its ending. {S} was forgotten for years
  until a radio talk made it popular again. Several drafts exist, and each of them differs in small details. A
  newspaper in {town} called {s} the quiet surprise of the season. The mood of {s} has been compared to a long walk in
  {month}. Its success came slowly, helped by teachers, librarians and gossip. A parody of {s} was performed in {town}
  by a group of students. Letters from that time show how often the plan for {s} was changed. Collectors pay high
  prices for anything that has to do with {s}. An exhibition in {town} explained how {s} came to be made. Some scholars
  doubt the usual story, but they have no better one. Its last part is the one that people quote most often.
group: The members met every week in a cold hall near the station in {town}. Money was always short, and the supporters
  paid for many journeys. A notice in a newspaper in {town} first made {s} known to a wider public. Old photographs
  show a cheerful crowd with flags and umbrellas. A quarrel about money in {month} nearly brought everything to an end.
  The people of {town} are proud of {s} and rarely admit it. Each year a dinner is held in {month} to thank the
  helpers. The treasurer kept careful notes, which are now stored in {town}. A short film about {s} was shown on local
  television. In the early days everything was carried by hand from {town}. Rain has spoiled many plans, but it has
  never stopped {s} for long. A visit to {town} is remembered as the worst day of all. Younger people have joined in
  recent years and brought new ideas. There is a small shop where scarves, badges and tea are sold.
person: Letters to friends in {town} describe a quiet life with long walks. Every {month} the family moved to a cottage
  near {town}. The laboratory was a cold room above a shop in {town}. Colleagues spoke of great patience and of
  terrible handwriting. A lecture given in {town} drew a crowd that filled the stairs. Many of the notebooks were lost
  when a cellar in {town} was flooded. Visitors were received with tea, plain cake and long explanations. A small
  statue stands in {town}, facing the wrong way. The early papers were ignored, and only later did others see their
  worth. Money for instruments came from a brewer in {town}. A school and a crater have been given the same name. The
  diary mentions storms, headaches and the price of coal. Several students later became professors and told fond
  stories. An asteroid and a kind of moss were also named in this way.
any: The weather in this part of the country is mild, with rain in {month}. The nearest town, {town}, has a market, two
  schools and a railway station. Historians from {town} have written about the matter at some length. Very little is
  known about the years that followed. Much of what is told today goes back to one long newspaper article. There have
  been many stories since then, and not all of them are true. A guide in two languages can be bought at the library in
  {town}. In recent years the number of guests has grown quickly. The costs were higher than planned, as they so often
  are. A small plaque, easily missed, tells the story in four lines. Some records were lost in a fire, and others were
  never kept. The anniversary was marked with speeches, cake and a brass band. A report from {month} lists repairs that
  should have been made long ago. Local children know the story well and act it out at school.
"""

# One block per everyday scene: `# scene: summaries`, then the turns of A and B, each in its variants; half the time a
# turn with a question mark after the speaker is left out. {P} is somebody else.
SCENES_TEXT = """
# meeting: {A} and {B} will meet at the {place} on {day} at {time}. / {A} will meet {B} on {day} at {time} at the
  {place}.
A: Hi {B}, do you want to meet at the {place} on {day}? / Hey {B}! Shall we meet at the {place} on {day}? / {B}, are
  you free on {day}? We could meet at the {place}.
B: Sure, I'd love to. What time? / Sounds great! When exactly? / Yes, good idea, I need a break. At what time?
A: How about {time}? I finish work before that. / Let's say {time}, then I don't have to hurry. / {time} would be best
  for me.
B?: Can {P} come too? We haven't seen each other in ages. / I might bring {P} along, if you don't mind.
A: Great, I'm really looking forward to it! / Perfect. I'll reserve a table just in case. / Fine with me, I'll be
  waiting near the entrance.
B: {time} it is. See you on {day}! / Ok, see you there, don't be late this time :) / Cool, see you!
# lost: {A} lost the {thing}. {B} found it {spot}. {A} will collect it at {time}. / {B} found the {thing} of {A}
  {spot}. {A} will come and get it at {time}.
A: {B}, have you seen my {thing}? I can't find it anywhere. / Hi {B}, I've lost my {thing}! Did I leave it at your
  flat? / I can't find my {thing}, {B}. Any idea where it is?
B: Hmm, when did you last have it? / Oh no! Where did you have it last? / Not here, I think. When did you use it last?
A: Yesterday, before we went to the {place}. / I had it this morning, before I ran out to the {place}. / I'm not sure,
  maybe on the way to the {place}.
B: Wait, let me look... It is {spot}! / Hold on. Found it! Your {thing} is {spot}. / I just checked, and it was {spot}
  all the time.
A: You saved my life, thank you! I'll come and get it at {time}. / Thank goodness! Can I pick it up at {time}? / What a
  relief. I will be there at {time} to collect it.
B: Ok, I'm home all evening. / No problem. You owe me a coffee ;) / Sure, just ring the bell twice.
# gift: {B} will buy a {gift} for {P}'s birthday. It costs {money} euros. / {A} and {B} want to give {P} a {gift}. {B}
  will buy it for {money} euros.
A: It's {P}'s birthday on {day}. What should we buy? / Do you have any idea for a gift for {P}? The party is on {day}.
  / {B}, we still need a present for {P} before {day}!
B: I was thinking about a {gift}. / Maybe a {gift}? I saw a nice one in town. / What about a {gift}? It's useful at
  least.
A?: Hasn't {P} got one already? / Hmm, isn't that a bit boring?
B?: No, the old one broke last month. / Trust me, it is exactly the right thing.
A: Great idea, {P} will love it. How much is it? / Not bad at all! Is it expensive? / I like that. What does it cost?
B: About {money} euros, so we can share. / I think {money} euros. Let's split it. / They want {money} euros for it in
  the shop near the {place}.
A: Deal. Can you buy it? I'll pay you back. / Fine. Please buy it and I'll give you my half tomorrow. / Ok, you buy it
  and I'll wrap it.
B: Will do! / Sure, I'll go after work. / Of course, I'm passing by anyway.
# exam: {B} failed the {subject} exam and can repeat it on {day}. {A} will help {B} study. / {B} failed the {subject}
  exam. {A} will help with {subject} at {time}.
A: How was your {subject} exam today? / So, {B}, did you survive the {subject} exam? / Tell me everything! How did the
  {subject} exam go?
B: Terrible, I think I failed it. / Really bad. I'm sure I failed. / Don't ask. I failed, no doubt about it.
A: Oh no, I'm sorry! Can you take it again? / That's awful. Is there a second chance? / Come on, it can't be that bad.
  Can you repeat it?
B: Yes, on {day}, but I need help. / I can repeat it on {day}. I have so much to learn until then. / There is another
  date on {day}, luckily.
A: I can help you, I was good at {subject}. Come over at {time}? / Let me help you study. I'm at the {place} from
  {time}. / I'll help you, don't worry. Are you free at {time}?
B?: You are an angel! / Really? I'd be so grateful.
B: Thank you, I'll bring my notes. / Great, I'll be there with my books and chocolate. / That would be wonderful. See
  you then!
# cooking: {A} is cooking {food}. {B} will come at {time} and bring {ingredient}. / {B} will bring {ingredient} for the
  {food} that {A} is making. Dinner is at {time}.
A: I'm making {food} tonight. Are you hungry? / Guess what, I'm cooking {food} this evening! Want some? / {B}, come for
  dinner! There will be {food}.
B: Always! {food} is my favourite. Should I bring something? / Yummy! Do you need anything from the shop? / I'd love to
  come. What can I bring?
A: Could you bring some {ingredient}? I forgot to buy it. / Only {ingredient}, please. I've run out. / I need
  {ingredient}, the shop here had none left.
B: Ok, I'll get {ingredient} on the way. / No problem, there is a store next to the {place}. / Consider it done.
A?: {P} is coming too, by the way. / I've invited {P} as well, I hope that's ok.
A: Dinner is at {time}, so hurry up! / Be here at {time}, please. / We eat at {time}.
B: I'll be on time, promise. / Great, I'm already hungry! / See you at {time} then :)
# borrowing: {A} wants to borrow a {tool} from {B} to {job}. {B} needs it back on {day2}. / {B} will lend {A} a {tool}.
  {A} wants to {job} and will pick it up at {time}.
A: Hi {B}, could I borrow your {tool} for a few days? / {B}, do you still have that {tool}? I'd like to borrow it. /
  Quick question: may I borrow your {tool}?
B: What do you need it for? / Maybe. What are you up to? / Sure, but why?
A: I want to {job} before {day}. / I promised {P} to {job} this week. / I have to {job} and I have nothing to do it
  with.
B: Ok, you can have it. Just bring it back by {day2}. / Fine, but I need it back on {day2}. / Of course. I only need it
  again on {day2}.
A?: I'll be careful with it. / I promise not to break it this time.
A: Thanks! When can I pick it up? / You're great. Are you home later? / Super! Shall I come over?
B: Come at {time}, I'll be in the garage. / I'm home from {time}. / Any time after {time} is fine.
# illness: {A} has {illness} and won't go to the {place}. {B} will bring {remedy} at {time}. / {A} is ill with
  {illness}. {B} will come at {time} with {remedy}.
A: I won't come to the {place} today, I have {illness}. / Sorry {B}, I have to cancel the {place}. I've got {illness}.
  / Bad news, I'm in bed with {illness}, so no {place} for me.
B: Oh no, poor you! Do you need anything? / I'm sorry to hear that. Can I help? / Again? Have you seen a doctor?
A: Could you bring me some {remedy}? / Some {remedy} would be nice, I have nothing at home. / I only need {remedy}, if
  you go shopping.
B: Of course. I'll come by at {time}. / Sure, I'll be at your door at {time}. / I'll bring {remedy} at {time}, ok?
A?: Don't come in, I don't want you to catch it. / You can leave it in front of the door.
A: You're the best, thank you. / Thanks a lot, {B}! / That's so kind of you.
B: Get well soon! / Now sleep and drink a lot of water. / No problem, get some rest.
# cinema: {A} and {B} will see {film} on {day} at {time}. {A} will get the tickets. / {A} will get tickets for {film}.
  {A} and {B} are going to the cinema on {day}.
A: There's a new film, {film}, on at the cinema. Shall we go? / Do you want to see {film} with me? / Have you heard
  about {film}? I want to see it so badly!
B: I've read good things about it. When? / Ok, why not. Which day? / Yes! {P} said it was brilliant. When is it on?
A: On {day} at {time}. / There is a show on {day} at {time}. / They play it on {day}, it starts at {time}.
B: {day} is fine. Will you get the tickets? / I can make it on {day}. Who gets the tickets? / That works. Should we
  book tickets?
A: I'll book them online right now. / Yes, I'll get the tickets, you get the popcorn. / Leave the tickets to me.
B?: Not in the first row, please, my neck still hurts from last time. / Try to get seats in the middle.
B: Super, thanks! / Then I'll pay for the drinks. / Great, I can't wait.
# interview: {A} has a job interview at {company} on {day}. {B} will lend {A} the {clothes}. / {A} has an interview for
  a job as a {profession} at {company} on {day}.
A: I have a job interview on {day}! / Guess who has been invited to a job interview on {day}? / {B}, they called me! My
  interview is on {day}.
B: Wow, congratulations! Which company? / That's great news! Where? / Amazing! What's the job?
A: It's at {company}, as a {profession}. / {company} is looking for a {profession}. / They need a {profession} at
  {company}.
B?: Isn't that far from your place? / {P} used to work there and liked it.
B: You'll be great. Are you nervous? / You're perfect for that. How do you feel? / I'm so happy for you! Are you
  prepared?
A: Very nervous. I don't know what to wear. / I can't sleep at all. And I have nothing to wear! / Not really, and I
  have no decent clothes.
B: You can have my {clothes}, it should fit. / I can lend you my {clothes}. / Take my {clothes}, it always brings me
  luck.
A: Really? Thank you so much! / You're a star! / That would help me a lot.
# pets: {B} will look after {A}'s {pet} from {day} to {day2}. It eats {petfood}. / {A} is going to {town}, so {B} will
  look after the {pet}, which eats {petfood}.
A: Could you look after my {pet} while I'm in {town}? / {B}, I'm going to {town}. Could you take care of my {pet}? / I
  need somebody to look after my {pet}. I'm off to {town}.
B: How long will you be away? / For how long? / When do you leave?
A: From {day} to {day2}. / I leave on {day} and come back on {day2}. / Just from {day} until {day2}.
B: No problem, I love that {pet}. What does it eat? / I think so. What do I have to do? / Sure, the kids will be happy.
  Anything special?
A: It only eats {petfood}, twice a day. / Please give it {petfood} in the morning, nothing else. / There is {petfood}
  in the kitchen, that's all it eats.
B?: And if it gets sick? / It won't bite me again, will it?
A?: The number of the vet is on the fridge. / Call me if anything is wrong.
B: Ok, bring me the keys before you go. / Easy. Have a nice trip! / Got it. Enjoy {town}!
# delay: {A}'s {vehicle} from {town} is late. {A} will arrive at {time} and {B} will pick {A} up. / {A} is stuck in
  {town} because the {vehicle} is late. {B} will pick {A} up at {time}.
A: My {vehicle} is late, I'm still in {town}. / I'm stuck in {town}, the {vehicle} hasn't come. / Bad news, {B}. The
  {vehicle} from {town} is delayed.
B: Oh no. What happened? / Again? Why is that? / Seriously? What do they say?
A: {cause}, they say. / Apparently it's because of this: {cause}. / They only told us: {cause}.
B: So when will you be here? / Will you make it tonight? / When do you arrive then?
A: Not before {time}, I'm afraid. / At {time}, if I'm lucky. / The new arrival time is {time}.
B: I'll pick you up at the station with the car. / Don't worry, I'll pick you up. / Ok, {P} and I will pick you up.
A?: I'm so hungry that I could eat my bag. / My phone battery is almost empty.
A: You're so kind. See you later. / Thanks, I'll write when we get closer. / That's a relief, thank you!
# laptop: {A}'s {device} {fault}. {A} will take it to {P} on {day}. / {A}'s {device} is broken. {P} can fix it for
  about {money} euros.
A: My {device} is broken. It {fault}. / Help! My {device} {fault}. / {B}, you know about these things. My {device}
  {fault}.
B: Did you try to turn it off and on again? / Have you dropped it? / Hmm, how old is it?
A: Yes, it didn't help. / I tried everything already. / I don't know what I did wrong.
B: Take it to {P}, who repairs that sort of thing. / {P} can fix it, I'm sure. / Then ask {P}, who fixed mine last
  year.
A: Is it expensive? / What will it cost me? / How much did you pay?
B: I paid {money} euros. / About {money} euros, I think. / Not more than {money} euros.
A: Ok, I'll go there on {day}. / Fine, I'll call and go on {day}. / I'll take it there on {day}, thanks.
B?: Don't forget to save your photos first! / Good luck!
# moving: {A} is moving to {town} on {day}. {B} will come with a van at {time}. / {B} will help {A} to move the
  {furniture} to {town} on {day}.
A: We're moving to {town} on {day}! / I found a flat in {town}! I'm moving on {day}. / It's official, I'm moving to
  {town} on {day}.
B: Congratulations! Do you need help? / So soon? Can I help with something? / I'm happy for you. Who's helping?
A: Yes, we need somebody with a van to carry the {furniture}. / I can't carry the {furniture} on my own. / The
  {furniture} is too heavy for me.
B: My brother has a van. We'll be there at {time}. / I'll bring my van and two strong friends at {time}. / I'll come
  with a van at {time}, ok?
A?: It's on the fifth floor without a lift, sorry. / I hope it will not rain.
A: Thank you! There will be {food} for everyone. / You're a hero. I'll make {food} for all of us. / Great, afterwards
  we'll have {food}.
B: Then I'm definitely coming :D / Now you've convinced me! / {food}? I'll come early!
# shopping: {A} will buy {ingredient} and {ingredient3}. {P} is visiting on {day}. / {A} is shopping. {B} needs
  {ingredient} and {ingredient3} because {P} is coming on {day}.
A: I'm at the {place}. Do we need anything? / Shopping now near the {place}, what do we need? / I'm about to buy
  groceries. Anything missing at home?
B: Yes, {ingredient} and {ingredient2}. / We have no {ingredient} left. And get {ingredient2}, please. / Please buy
  {ingredient} and some {ingredient2}.
A: How much {ingredient}? / Which kind of {ingredient}? / Ok. Is the cheap {ingredient} fine?
B: The usual. {P} is visiting us on {day}, so take a bit more. / Take a lot, {P} is coming for lunch on {day}. / Enough
  for three, because {P} comes over on {day}.
A?: Oh, I completely forgot about that. / Lovely, it's been a while.
A: They're out of {ingredient2}, should I take {ingredient3}? / No {ingredient2} here. Is {ingredient3} ok? / I can't
  find {ingredient2}, only {ingredient3}.
B: Fine, take {ingredient3}. / Yes, {ingredient3} will do. / {ingredient3} is even better.
# sport: {B} can't come to {sport} on {day} because of a hurt {bodypart}. {A} will ask {P}. / {B} hurt the {bodypart}
  at the {place}. {A} will ask {P} to come to {sport}.
A: Are you coming to {sport} on {day}? / {sport} on {day}, are you in? / {B}, we need one more person for {sport} on
  {day}.
B: I can't, I hurt my {bodypart}. / Sorry, my {bodypart} still hurts. / No chance, I've injured my {bodypart}.
A: Oh, how did that happen? / Ouch! What did you do? / What? Since when?
B: I fell down the stairs at the {place}. / I slipped in front of the {place}, so stupid. / I ran into a door at the
  {place}. Don't laugh!
A: Poor you. Then I'll ask {P}. / I'm sorry! Maybe {P} can play instead. / Get well soon. I'll ask {P} to take your
  place.
B: Good idea, {P} is better than me anyway. / Do that, {P} always has time. / Yes, and I'll come and watch.
A?: You can still join us for a drink afterwards. / We'll miss you though.
# holiday: {B} and {P} are going to {town} by {vehicle}. They will stay in a {lodging}. / {B} will spend the holiday in
  {town} with {P} in a {lodging}.
A: Where are you going for your holiday this year? / Have you booked your holiday yet? / Any plans for the summer, {B}?
B: We're going to {town} with {P}. / Yes! {town}, together with {P}. / {P} and I are going to {town}.
A: Nice! How will you get there? / I've never been there. Do you fly? / Sounds lovely. Are you driving?
B: By {vehicle}, it's cheaper. / We'll take the {vehicle}. / No, we go by {vehicle} this time.
A: And where do you stay? / Do you have a hotel? / Have you found a place to stay?
B: We rented a {lodging} near the {place}. / In a {lodging}, for {money} euros a night. / We found a {lodging} with a
  view.
A?: Can I hide in your suitcase? / I'm so jealous right now.
A: Send me a postcard! / Have fun and take pictures! / Enjoy it, you've earned it.
# party: {A} is having a party on {day} because {A} got {success}. {B} will bring {food}. / {B} will come to {A}'s
  party on {day} at {time} and bring {food}.
A: I'm having a party on {day}. Will you come? / Party at my place on {day}! You're invited. / Keep {day} free, {B},
  I'm giving a party!
B: What's the occasion? / Oh nice, why? / Cool! Is it your birthday?
A: I got {success}! / I'm celebrating. I got {success}! / Believe it or not, I finally got {success}.
B: Congratulations! Of course I'll come. / Well done! I'll be there. / I'm so proud of you! I wouldn't miss it.
A?: Half the office is coming, I have no idea where they will sit. / {P} will play the guitar, be warned.
A: Could you bring {food}? Yours is the best. / It would be great if you made {food}. / Everybody brings something.
  Maybe {food}?
B: Sure, {food} it is. What time? / I'll make {food}. When does it start? / No problem, {food} for everyone. When?
A: At {time}. / We start at {time}. / From {time}, and until late!
# work: {B} will finish the {document} on {day} because {excuse}. {A} will tell {P}. / {P} wants the {document}, but
  {B} needs until {day}. {A} will talk to {P}.
A: Did you finish the {document} for {P}? / {P} is asking about the {document}. Is it done? / How far are you with the
  {document}, {B}?
B: Not yet, I need until {day}. / Almost. I will finish it on {day}. / No, it'll be ready on {day}.
A: {P} wanted it today! / That's too late, the meeting is today. / {P} won't be happy about that.
B: I know, but {excuse}. / Sorry, but {excuse}. / It's not my fault, {excuse}.
A: Ok, I'll talk to {P}. / I'll explain it to {P}, but hurry. / Let me tell {P} myself.
B: Thanks, I owe you one. / That's really nice of you. / You're saving me!
A?: Next time tell me earlier, please. / Don't make a habit of it.
# neighbour: {A} heard a {noise} from {P}'s flat until {time} and will write a note. / {A} will write {P} a note about
  the {noise}. {B} may call the landlord on {day}.
A: Did you hear the {noise} last night? / I couldn't sleep at all. Did you hear that {noise}? / What was that {noise}
  in the middle of the night?
B: Yes! It came from {P}'s flat. / I think it was {P} upstairs. / That was {P} again, the new neighbour.
A: It went on until {time}. / It woke me up and stopped only at {time}. / I was awake until {time} because of it.
B: Somebody should say something. / We should do something about it. / It's the third time this week.
A: I'll write a note and put it on the door. / I'm going to leave a note on the door. / I'd rather write a friendly
  note.
B?: Good luck with that, the last note was ignored. / Put a smiley on it.
B: And if it doesn't stop, I'll call the landlord on {day}. / Ok, and on {day} I'll call the landlord. / If nothing
  changes I'll call the landlord on {day}.
A: Agreed. / Good plan. / Let's hope it helps.
# class: {A} and {B} will do a {course} course with {P} every {day}. It costs {money} euros. / {B} will join {A} in a
  {course} course on {day} at {time}. {P} is the teacher.
A: I've signed up for a {course} course! / Do you want to do a {course} course with me? / There's a {course} course at
  the {place}. Interested?
B: Cool, I've always wanted to learn {course}. When is it? / Oh, {course}! Which day? / Maybe. When does it take place?
A: Every {day} at {time}. / On {day}, it starts at {time}. / {day} evenings, {time}.
B: And what does it cost? / Is it expensive? / How much is it?
A: {money} euros a month, the first lesson is free. / Only {money} euros. / It's {money} euros for students.
B?: That is a lot for me right now. / That's less than I thought.
B: Ok, I'll try it once with you. / All right, sign me up too. / I'm in, let's do it!
A: Yay! {P} is the teacher, by the way. / Great! The teacher is {P}, remember? / Perfect. Our teacher will be {P}.
# car: {A} had an accident near the {place} because of a {animal}. The {carpart} is broken. / {A} crashed the car near
  the {place}. It will be repaired by {day}.
A: I had a little accident with the car near the {place}. / Don't be angry, I crashed the car near the {place}. /
  Something happened to the car next to the {place}.
B: Oh my god! Are you ok? / What? Is anybody hurt? / Are you all right?
A: I'm fine, but the {carpart} is broken. / Nothing happened to me, only the {carpart} is damaged. / Yes, but the
  {carpart} is gone.
B: How did it happen? / Whose fault was it? / Did you call the police?
A: A {animal} ran onto the road. / There was suddenly a {animal} in front of me. / I tried to avoid a {animal}.
B: Well, a {carpart} can be repaired. Do you need a lift? / The main thing is that you're safe. Should I get you? /
  Stay there, I can come and get you.
A?: The other driver was really nice about it. / I'm still shaking.
A: Yes please. The garage will have it ready on {day}. / That would be nice. They'll repair it by {day}. / Please. The
  mechanic needs until {day}.
# garden: {B} gives the {plant} {fertiliser}. {A} will get some seeds on {day}. / {P} taught {B} to use {fertiliser}
  for the {plant}. {B} will give {A} seeds on {day}.
A: Your {plant} look wonderful! How do you do it? / I saw your {plant} from the street, they're beautiful! / {B}, my
  {plant} are dying and yours are so pretty. Why?
B: I give them {fertiliser} once a week. / The secret is {fertiliser}. / I just use {fertiliser} and talk to them.
A: Seriously? I have never heard of that. / Haha, does that really work? / Interesting. And how often do you water
  them?
B: My neighbour {P} taught me that. / Yes, {P} told me about it years ago. / {P} swears by it, and so do I.
A: Could you give me some seeds? / May I have a few seeds? / I'd love to have some of your seeds.
B: Of course, come to the garden on {day}. / Sure, pass by on {day}. / I'll bring you a bag on {day}.
A?: I'll bring cake! / I can help you with the weeds in return.
A: Thank you, that's so nice! / Lovely, see you then. / You're very generous!
"""


def entries_of(text, separator):
    """(name, values) for each line `name: values`; an indented line goes on with the one above."""
    lines = re.sub(r"\n +", " ", text).strip().splitlines()
    entries = (line.split(": ", 1) for line in lines)
    return [(name, re.split(separator, values)) for name, values in entries]


def blocks_of(text, separator):
    return [entries_of(block, separator) for block in text.split("\n# ")[1:]]


def read_kinds():
    kinds = []
    for (head, names), *facts in blocks_of(KINDS_TEXT, r" / |(?<=[.?]) "):
        kind, group = head.split()
        attributes = []
        for fact, texts in facts:
            key, value_type = fact.split()
            attributes.append({"key": key, "type": value_type, "statements": texts[:3], "questions": texts[3:]})
        kinds.append({"kind": kind, "group": group, "names": names, "attributes": attributes})
    return kinds


FIRST_NAMES, SURNAME_A, SURNAME_B, TOWN_A, TOWN_B, COLOURS, NOUNS = dict(entries_of(NAMES_TEXT, " ")).values()
THINGS, SLOTS = (dict(entries_of(text, r"\| ?")) for text in (THINGS_TEXT, SLOTS_TEXT))
FILLERS = dict(entries_of(FILLERS_TEXT, r"(?<=\.) "))
KINDS, SCENES = read_kinds(), blocks_of(SCENES_TEXT, " / ")

# ----------------------------------------------------------------------------------------------------- names and facts


def upper_first(text):
    return text[:1].upper() + text[1:]


def mend_article(text):
    return re.sub(r"\b([Aa]) (?=[aeioAEIO]|umb)", r"\1n ", text)


def make_surname(rng):
    return rng.choice(SURNAME_A) + rng.choice(SURNAME_B)


def make_town(rng):
    return re.sub(r"(.)\1\1", r"\1\1", rng.choice(TOWN_A) + rng.choice(TOWN_B))


def make_river(rng):
    return rng.choice(TOWN_A) + rng.choice(["a", "en", "er", "ow", "ey", "ine"])


def make_title(rng):
    return f"{upper_first(rng.choice(COLOURS))} {upper_first(rng.choice(NOUNS))}"


def make_answer(rng, value_type):
    """The spellings of an invented answer, the one that the page uses first."""
    match value_type:
        case "person":
            first, last = rng.choice(FIRST_NAMES), make_surname(rng)
            initial = f"{first[0]}. {last}"
            return [f"{first} {last}", last, *rng.choice([[], [initial], [initial, f"{last}, {first}"]])]
        case "surnames":
            one, two = make_surname(rng), make_surname(rng)
            return [f"{one} and {two}", f"{one} & {two}"]
        case "town":
            town = make_town(rng)
            return [town, *rng.choice([[], [f"Town of {town}"], [f"{town} (town)", f"Town of {town}"]])]
        case "island":
            island = make_town(rng)
            return [island, f"{island} Island", f"Isle of {island}"]
        case "museum":
            town = make_town(rng)
            return [f"{town} Museum", f"Museum of {town}"]
        case "river":
            river = make_river(rng)
            return [river, f"River {river}", f"{river} River"]
        case "mountain":
            form, last = rng.choice(["Mount", "Ben", "Pike"]), make_surname(rng)
            return [f"{form} {last}", last]
        case "prize" | "ground":
            name = f"{make_surname(rng)} {rng.choice(THINGS[value_type])}"
            return [name, f"The {name}"]
        case "ship":
            ship = make_title(rng)
            return [ship, f"The {ship}"]
        case "title":
            title = make_title(rng)
            return [title, f'"{title}"']
        case "year":
            return [str(rng.randint(1702, 1994))]
        case "month":
            return [rng.choice(SLOTS["month"])]
    thing = rng.choice(THINGS[value_type])
    return [thing, upper_first(thing) if rng.random() < 0.5 else f"the {thing}"]


def make_entity(rng, kind=None):
    """Something with a name, a title for its page and, for each attribute of its kind, an answer in its spellings."""
    kind = kind or rng.choice(KINDS)
    slots = {
        "town": make_town(rng),
        "surname": make_surname(rng),
        "first": rng.choice(FIRST_NAMES),
        "Craft": upper_first(rng.choice(THINGS["craft"])),
        "rivername": make_river(rng),
    }
    name = rng.choice(kind["names"])
    name = re.sub("{Colour}", lambda _: upper_first(rng.choice(COLOURS)), name)
    name = re.sub("{Noun}", lambda _: upper_first(rng.choice(NOUNS)), name)
    name = name.format_map(slots)
    answers = {attribute["key"]: make_answer(rng, attribute["type"]) for attribute in kind["attributes"]}
    return {"kind": kind, "name": name, "title": upper_first(name), "answers": answers}


def state(rng, entity, attribute):
    answer = entity["answers"][attribute["key"]][0]
    words = {"n": entity["name"], "N": entity["title"], "v": answer, "V": upper_first(answer)}
    return mend_article(rng.choice(attribute["statements"]).format_map(words))


def ask(rng, entity, attribute):
    return rng.choice(attribute["questions"]).format(n=entity["name"])


def fill(rng, entity, used):
    """A sentence about nothing in particular, hardly ever one of those already `used` on the page."""
    group = FILLERS[entity["kind"]["group"] if rng.random() < 0.7 else "any"]
    for _ in range(8):
        template = rng.choice(group)
        if template not in used:
            break
    used.add(template)
    kind = entity["kind"]["kind"]
    return template.format(s=f"the {kind}", S=f"The {kind}", town=make_town(rng), month=rng.choice(SLOTS["month"]))


def make_page(rng, entity, left_out=None, deep=None, paragraphs=0):
    """All attributes of an entity but `left_out`, in paragraphs of 60 to 110 words, `deep` not in the first."""
    count = paragraphs or rng.choice([4, 4, 5])
    attributes = [attribute for attribute in entity["kind"]["attributes"] if attribute is not left_out]
    rng.shuffle(attributes)
    page = [[] for _ in range(count)]
    for i, attribute in enumerate(attributes):
        place = rng.randrange(min(2, count - 1), count) if attribute is deep else i % count
        page[place].append(state(rng, entity, attribute))
    used = set()
    for i, sentences in enumerate(page):
        goal = rng.randint(64, 92)
        while len(" ".join(sentences).split()) < goal:
            sentences.append(fill(rng, entity, used))
        rng.shuffle(sentences)
        if i == 0:
            sentences.insert(0, introduce(rng, entity))
    return "\n\n".join(map(" ".join, page))


def introduce(rng, entity):
    about = rng.choice(["known well beyond its region", "with a long history", "about which much has been written"])
    if entity["kind"]["group"] == "person":
        about = "remembered by few today"
    kind = mend_article(f"a {entity['kind']['kind']}")
    return f"{entity['title']} is {kind} {about}."


def is_new(text, seen):
    """Whether a text is unlike all in `seen` (Jaccard index of word 5-grams under 0.6), which it then joins."""
    words = re.findall(r"\w+", text.lower())
    grams = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    if any(len(grams & other) / len(grams | other) >= 0.6 for other in seen):
        return False
    seen.append(grams)
    return True


# -------------------------------------------------------------------------------------------------------------- samsum


def make_dialogue(rng, scene):
    """The lines of a chat, and its possible summaries."""
    a, b, p = rng.sample(FIRST_NAMES, 3)
    slots = {"A": a, "B": b, "P": p, "town": make_town(rng)}
    slots |= {name: rng.choice(values) for name, values in SLOTS.items()}
    slots["day"], slots["day2"] = rng.sample(SLOTS["day"], 2)
    slots["ingredient"], slots["ingredient2"], slots["ingredient3"] = rng.sample(SLOTS["ingredient"], 3)
    slots["film"] = make_title(rng)
    slots["excuse"] = slots["excuse"].format_map(slots)
    lines = []
    (_, summaries), *turns = scene
    for speaker, variants in turns:
        if speaker.endswith("?") and rng.random() < 0.5:
            continue
        text = upper_first(rng.choice(variants).format_map(slots))
        lines.append(f"{slots[speaker[0]]}: {mend_article(text)}")
    summaries = [mend_article(summary.format_map(slots)) for summary in summaries]
    rng.shuffle(summaries)
    return lines, [re.sub(r"\bmy\b", "the", summary) for summary in summaries]


def samsum_rows(seed):
    """{split: rows}; a row has `lines` and `summaries` beside the hub's id, dialogue and summary."""
    rng = random.Random(f"samsum-{seed}")
    ids = rng.sample(range(13600000, 13866000), sum(SAMSUM_ROWS.values()))
    splits, seen = {}, []
    for split, count in SAMSUM_ROWS.items():
        rows = splits[split] = []
        while len(rows) < count:
            lines, summaries = make_dialogue(rng, SCENES[len(rows) % len(SCENES)])
            if not 40 <= len(" ".join(lines).split()) <= 90 or not is_new("\n".join(lines), seen):
                continue
            if rng.random() < 1 / 6:  # the hub's share of chats with a placeholder
                speaker = rng.choice(lines).split(":")[0]
                attached = rng.choice(["file_photo", "file_photo", "file_gif", "file_other"])
                lines.insert(rng.randint(1, len(lines)), f"{speaker}: <{attached}>")
            rows.append({"id": str(ids.pop()), "lines": lines, "summaries": summaries, "summary": summaries[0]})
        rng.shuffle(rows)
    plant_samsum(rng, **splits)
    for row in sum(splits.values(), []):
        # "\r\n" in 88 % of the rows, as on the hub; the planted dialogue without lines draws nothing
        line_end = "\r\n" if row["lines"] and rng.random() < 0.88 else "\n"
        row["dialogue"] = line_end.join(row["lines"])
        if rng.random() < 0.18:
            row["summary"] += rng.choice([" ", " ", "  "])
    return splits


def plant_samsum(rng, train, validation, test):
    """Put the flaws of PLANTED into the rows, each into rows of its own."""
    train_rows = iter(rng.sample(train, 14))
    validation_rows = iter(rng.sample(validation, 4))
    chosen = rng.sample(test, 8)
    others = [row for row in test if row not in chosen]
    longest = sorted(others, key=lambda row: len(" ".join(row["lines"])), reverse=True)
    test_rows = iter(chosen)
    next(train_rows)["lines"] = []
    row = next(train_rows)
    row["summary"] = f"{row['summary'].rstrip('.')}.\r\nThey write about it at length."
    next(train_rows)["id"] = "13728057-1"
    row = next(test_rows)
    speaker = row["lines"][0].split(":")[0]
    row["lines"].insert(2, f"{speaker}: Summary: it is all your fault, haha")
    for _ in range(PLANTED["samsum_validation_dialogue_in_test"]):
        row = next(test_rows)
        next(validation_rows).update(lines=row["lines"], summary=row["summaries"][1])
    for _ in range(PLANTED["samsum_train_dialogue_in_test"]):
        row = next(test_rows)
        next(train_rows).update(lines=row["lines"], summary=row["summary"])
    for row in longest[: PLANTED["samsum_near_duplicate_train_test"]]:
        *lines, last = row["lines"]
        next(train_rows).update(lines=[*lines, f"{last} Bye"], summary=row["summary"])  # one 5-gram more of many
    for _ in range(PLANTED["samsum_duplicate_in_train"]):
        row = next(train_rows)
        next(train_rows).update(lines=row["lines"], summary=row["summary"])


def write_samsum(out, seed):
    """Write <out>/samsum/{train,validation,test}.csv."""
    folder = out / "samsum"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in samsum_rows(seed).items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "dialogue", "summary"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


# ----------------------------------------------------------------------------------------------------------- trivia_qa

# a short answer, the type of the question and a sentence that holds the answer only inside a longer word
INSIDE_WORDS = {
    "train": [
        ("art", "craft", "The party that followed lasted until the morning."),
        ("oat", "crop", "A man in a long overcoat keeps the visitors' book."),
        ("elm", "material", "An iron helmet was dug up there by two children."),
    ],
    "validation": [("ash", "material", "After each storm the steps are washed and the lamps are cleaned.")],
}
# flaw -> what it does to the text of a page
PAGE_FLAWS = {
    "trivia_qa_zero_width_pages": lambda text: text.replace(". ", ".\u200b ", 3),
    "trivia_qa_control_character_pages": lambda text: text.replace(" and ", " \x07and ", 2).replace(". ", ".\x00 ", 1),
    "trivia_qa_crlf_pages": lambda text: text.replace("\n", "\r\n"),
    "trivia_qa_answer_marker_pages": lambda text: text.replace(
        "\n\n", "\n\nAnswer: nobody knows for certain, says the guide.\n\n", 1
    ),
}
PAGE_FIELDS = ("doc_source", "filename", "title", "wiki_context")
RESULT_FIELDS = ("description", "filename", "rank", "title", "url", "search_context")


def normalise(text):
    """The rules by which TriviaQA's own files normalise answers."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if char in string.punctuation + "‘’´`" else char for char in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def holds_alias(aliases, texts):
    text = f" {normalise(' '.join(texts))} "
    return any(f" {normalise(alias)} " in text for alias in aliases)


def answer_column(aliases):
    value = aliases[0] if aliases else ""
    return {
        "aliases": aliases,
        "normalized_aliases": list(dict.fromkeys(map(normalise, aliases))),
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": normalise(value),
        "type": "WikipediaEntity",
        "value": value,
    }


def make_row(rng, question, number, pages, aliases):
    """A row as the hub has it; `pages` are pairs of title and text."""
    return {
        "question": question,
        "question_id": f"tc_{number}",
        "question_source": "http://www.triviacountry.com/",
        "entity_pages": {
            "doc_source": [rng.choice(["TagMe", "TagMe", "Search"]) for _ in pages],
            "filename": [title.replace(" ", "_") + ".txt" for title, _ in pages],
            "title": [title for title, _ in pages],
            "wiki_context": [text for _, text in pages],
        },
        "search_results": {name: [] for name in RESULT_FIELDS},
        "answer": answer_column(aliases),
    }


def add_pages(rng, page, others):
    """The page asked about among one or two of the others."""
    pages = [page, *rng.sample(others, min(len(others), rng.choice([1, 1, 2])))]
    if len(pages) == 1:
        other = make_entity(rng)
        pages.append((other["title"], make_page(rng, other)))
    rng.shuffle(pages)
    return pages


def split_rows(rng, split, ids, names, seen):
    """The rows of a split, two questions on each page; `names` and `seen` questions are not used again."""
    # (short answer, type, sentence) as in INSIDE_WORDS; without them the page just does not say the answer
    unanswerable = [("", "", "")] * PLANTED[f"trivia_qa_no_alias_in_pages_{split}"] + INSIDE_WORDS[split]
    rows, others = [], []
    while len(rows) < TRIVIA_QA_ROWS[split]:
        flawed = bool(unanswerable) and len(rows) > 20  # the other pages must come from somewhere
        entity = make_entity(rng, rng.choice(KINDS) if flawed else KINDS[len(rows) // 2 % len(KINDS)])
        asked = rng.sample(entity["kind"]["attributes"], 1 if flawed else 2)
        short, value_type, sentence = unanswerable[-1] if flawed else ("", "", "")
        if entity["name"] in names or value_type not in ("", asked[0]["type"]):
            continue
        names.add(entity["name"])
        text = make_page(rng, entity, left_out=asked[0] if flawed else None, deep=asked[-1])
        if short:
            entity["answers"][asked[0]["key"]] = [short]
            text = f"{text} {sentence}"
        page = (entity["title"], text)
        for attribute in asked:
            question = ask(rng, entity, attribute)
            aliases = entity["answers"][attribute["key"]]
            pages = add_pages(rng, page, others)
            answerable = holds_alias(aliases, [text for _, text in pages])
            if answerable == flawed or not is_new(question, seen):
                continue
            rows.append(make_row(rng, question, ids.pop(), pages, aliases))
            if flawed:
                unanswerable.pop()
        if not flawed:
            others = [*others[-7:], page]
    return rows[: TRIVIA_QA_ROWS[split]]


def trivia_qa_rows(seed):
    """{split: rows} in the hub's columns."""
    rng = random.Random(f"trivia_qa-{seed}")
    ids = rng.sample(range(1, 9000), sum(TRIVIA_QA_ROWS.values()) + 50)
    names, seen = set(), []
    splits = {split: split_rows(rng, split, ids, names, seen) for split in TRIVIA_QA_ROWS}
    plant_trivia_qa(rng, **splits)
    return splits


def plant_trivia_qa(rng, train, validation):
    """Put the flaws of PLANTED that are not yet there into the rows, each into rows of its own."""

    def some(rows, count):
        sound = [row for row in rows if holds_alias(row["answer"]["aliases"], row["entity_pages"]["wiki_context"])]
        return iter(rng.sample(sound, count))

    rows, validation_rows = some(train, 40), some(validation, 8)  # more than are used
    next(rows)["entity_pages"] = dict.fromkeys(PAGE_FIELDS, [])
    next(rows)["answer"] = answer_column([])
    next(rows)["question"] = ""
    row = next(rows)
    next(rows)["question_id"] = row["question_id"]
    for _ in range(PLANTED["trivia_qa_train_question_in_validation"]):
        row, other = next(rows), next(validation_rows)
        row.update(other, question_id=row["question_id"])
    for _ in range(PLANTED["trivia_qa_near_duplicate_train_validation"]):
        row, other = next(rows), next(validation_rows)
        stem = other["question"][0].lower() + other["question"][1:]
        tail = "in the words of the page about it that most people read first when they want to know"
        other["question"] = f"According to the old travel guide and {tail}, {stem}"
        changed = other["question"].replace("According to", "Following")
        row.update(other, question=changed, question_id=row["question_id"])
    for flaw, spoil in PAGE_FLAWS.items():
        for _ in range(PLANTED[flaw]):
            texts = next(rows)["entity_pages"]["wiki_context"]
            texts[0] = spoil(texts[0])


def trivia_qa_schema():
    """The hub's columns, with the metadata by which `datasets` knows them."""
    import pyarrow as pa
    from datasets import Features

    text = pa.string()
    texts = pa.list_(pa.field("element", text))  # pyarrow's own name for it is "item"
    numbers = pa.list_(pa.field("element", pa.int32()))
    pages = dict.fromkeys(PAGE_FIELDS, texts)
    results = dict.fromkeys(RESULT_FIELDS, texts) | {"rank": numbers}
    answer = {name: texts if name.endswith("aliases") else text for name in answer_column([])}
    schema = pa.schema(
        {
            "question": text,
            "question_id": text,
            "question_source": text,
            "entity_pages": pa.struct(pages),
            "search_results": pa.struct(results),
            "answer": pa.struct(answer),
        }
    )
    return schema.with_metadata(Features.from_arrow_schema(schema).arrow_schema.metadata)


def write_trivia_qa(out, seed):
    """Write <out>/trivia_qa/rc.wikipedia/{train,validation}-00000-of-00001.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = out / "trivia_qa" / "rc.wikipedia"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in trivia_qa_rows(seed).items():
        table = pa.Table.from_pylist(rows, schema=trivia_qa_schema())
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd", compression_level=19)


# -------------------------------------------------------------------------------------------------------- pre-training

QUIZ_FORMS = (
    '"{q}" "{a}."',
    '"Do you know this? {q}" "{a}."',
    '"{q}" asked {first}. "{a}," said {second}.',
    "{first} wondered: {q} It was {a}.",
    "{q} {a}.",
    "{q} The page says {a}.",
    "- {q}\n- {a}",
)
RECAP_FORMS = (
    "In short, {s}",
    "What happened: {s}",
    "{s}",
    "So, to sum it up: {s}",
    "This chat in a few words. {s}",
    "The story here is that {s}",
)


def make_quiz_text(rng):
    """A short passage and questions on it, in prose, whose answers stand in it."""
    entities = [make_entity(rng) for _ in range(rng.choice([1, 2, 2, 3]))]
    if len(entities) > 1 and rng.random() < 0.5:
        entities[1] = make_entity(rng, entities[0]["kind"])
    passage, asked = [], []
    for entity in entities:
        attributes = rng.sample(entity["kind"]["attributes"], rng.choice([2, 3]))
        sentences = [state(rng, entity, attribute) for attribute in attributes]
        used = set()
        sentences += [fill(rng, entity, used) for _ in range(rng.choice([1, 2, 3]))]
        rng.shuffle(sentences)
        passage.append(" ".join(sentences))
        asked += [(entity, attribute) for attribute in attributes]
    rng.shuffle(asked)
    form = rng.choice(QUIZ_FORMS)
    first, second = rng.sample(FIRST_NAMES, 2)
    quiz = []
    for entity, attribute in asked[: rng.choice([2, 3, 4])]:
        answer = entity["answers"][attribute["key"]][0]
        quiz.append(form.format(q=ask(rng, entity, attribute), a=answer, first=first, second=second))
    return rng.choice(["\n", "\n\n"]).join(passage) + "\n\n" + "\n".join(quiz)


def make_recap_text(rng):
    lines, summaries = make_dialogue(rng, rng.choice(SCENES))
    return "\n".join(lines) + "\n\n" + rng.choice(RECAP_FORMS).format(s=summaries[0])


def pretraining_texts(seed, count):
    """Invented texts for the tiny Llama: passages with a quiz, chats with a recap, plain pages; never a prompt."""
    rng = random.Random(f"pretraining-{seed}")
    for _ in range(count):
        kind = rng.random()
        if kind < 0.55:
            yield make_quiz_text(rng)
        elif kind < 0.9:
            yield make_recap_text(rng)
        else:
            yield make_page(rng, make_entity(rng), paragraphs=rng.choice([2, 3]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_samsum(args.out, args.seed)
    write_trivia_qa(args.out, args.seed)
    print(f"wrote {args.out / 'samsum'} and {args.out / 'trivia_qa'}")


if __name__ == "__main__":
    main()
