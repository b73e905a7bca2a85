"""What customer mails are put together from; customer_mails.py does it.

A gap such as {item} is filled from the list of that name. Of every five phrases of a list three are
for training, the fourth for validation, the fifth for the test (`SHARES`).
"""

SHARES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}

# fmt: off
SENTENCES = {
    "complaint": (
        "I have to complain about order {order}: {problem}.",
        "My {item} came last week, order {order}, and {problem}. On top of that {problem}.",
        "I am really annoyed, {problem} and {problem}! The order was {order}.",
        "Something went badly wrong with my order ({order}), because {problem}.",
        "Very poor service. I bought a {item} with number {order} and now {problem}.",
        "I paid {price} for this and {problem}. That is not acceptable.",
        "Sorry, but this is a joke: {problem}, {problem}. See {order}.",
        "I want my money back for {order}, since {problem}.",
        "Bad luck with {order} again, {problem}, and it cost me {price}.",
        "What a letdown your shop is! {problem} (my purchase {order}).",
        "Unbelievable: first {problem}, then {problem}.",
        "I am sending the {item} back, {problem}. It was bought as {order}.",
        "Order {order} is a disaster, {problem}.",
        "I expected better of you. In parcel {order} {problem}.",
        "For {price} one should get more than this: {problem}, and {problem}. Reference {order}.",
        "Never again! {problem}, and the {item} is not worth {price} anyway.",
        "I am not satisfied with {order}. {problem}.",
        "Your quality gets worse and worse, {problem} and {problem}.",
        "How can it be that {problem}? I am angry about {order}.",
        "This is the worst {item} I ever had, {problem}. Invoice {order}.",
    ),
    "enquiry": (
        "When will order {order} be sent?",
        "Do you also have the {item} in green?",
        "Could you tell me whether {order} can go to another address?",
        "Is it possible to add a {item} to my order {order}?",
        "Which sizes does the {item} come in, and is {price} the final price?",
        "How long is the guarantee on the {item} that I bought under {order}?",
        "What is the best thing to do when {problem}?",
        "Would you send me a copy of the receipt for {order}?",
        "May I pay {order} later this month, in two parts?",
        "Does the {item} fit through a door that is 70 cm wide?",
        "I was wondering if the {item} can be washed at home.",
        "Can I pick up {order} in the shop?",
        "I would like to know how to register {order} with you.",
        "Where can I find out which day {order} gets here?",
        "Is there anything one can do at home in case {problem}? It is about {order}.",
        "Please tell me if a {item} for {price} is still in stock.",
        "Who repairs a {item} near me? I have {order}.",
        "Is the {item} made of metal, and how heavy is it?",
        "I have a question about {order}: does it include the {item}?",
        "What does it cost to have {order} shipped abroad?",
    ),
    "thanks": (
        "Thank you for the quick delivery of {order}!",
        "The {item} is wonderful, my family loves it. It was order {order}.",
        "Last month {problem}, but your team put it right within a day. Thanks!",
        "Just a word of praise for order {order}: everything was perfect.",
        "Many thanks for the {item}, worth every penny of the {price}.",
        "I am so happy with the {item} from order {order}.",
        "You sorted out {order} so kindly after {problem}. Great service!",
        "Thanks a lot to the lady who helped me with {order}.",
        "What a lovely {item}, and so well packed ({order}). Brilliant work.",
        "Hats off to your staff: {problem}, and the same evening a new one was here.",
        "Everything arrived in time, thank you very much, order {order}.",
        "We are delighted with our {item}.",
        "The replacement for {order} is here, thanks for your help when {problem}.",
        "You made my week, the {item} is just beautiful and {order} came early.",
        "I wanted to let you know how pleased I am: {order} was handled with such care.",
        "Five stars from me for the {item}!",
        "I am grateful that you were so patient with me about {order}.",
        "A big compliment for your fast answer on {order}.",
        "For {price} the {item} is a real bargain, I shall tell all my friends.",
        "It was a joy to unpack {order}, the {item} is even nicer than on the picture.",
    ),
}
CUES = {  # sentences by what they add to the urgency of a mail
    0.3: (
        "I need it by Friday.", "Please answer today.", "It is a present for tomorrow.",
        "We leave on holiday in the morning.", "This cannot wait.",
        "My guests arrive tonight.", "I need a solution at once.", "The wedding is in two days.",
        "It has to be here before the weekend.", "Please hurry, time is running out.",
        "This is an emergency.", "I must have it by noon.", "Please call me back right now.",
        "I need an answer within the hour.", "My train leaves in three hours.",
        "As fast as you can, please!", "Tomorrow will be too late.", "Every day counts.",
        "The party is on Saturday, so be quick.", "Please deal with it immediately.",
    ),
    0.2: (
        "This is the third time I write.", "Nobody has replied to my last mail.",
        "I have called you twice already.", "If nothing happens I will go to a lawyer.",
        "I have asked for this several times.", "I wrote about it last week and heard nothing.",
        "I am still waiting for an answer.", "My patience is at an end.",
        "Why does nobody answer me?", "Without an answer I will tell the consumer office.",
        "You have ignored me for a month.", "I keep writing and you keep silent.",
        "My last two messages were not answered.", "I will tell my lawyer about it.",
        "I am tired of waiting for you.", "Again no answer from you.",
        "How often do I have to ask?", "I shall write to the newspaper about you.",
        "Last time you promised to call and did not.", "I have been waiting for weeks now.",
    ),
    -0.2: (
        "There is no hurry.", "Answer whenever you have time.", "It is not important.",
        "I can easily wait a few weeks.", "Take all the time you need.",
        "No need to reply soon.", "Next month is early enough.", "It is not urgent at all.",
        "I am in no rush.", "Do it when it suits you.",
        "Any time this year is fine.", "Just when you get around to it.", "It can wait.",
        "There is plenty of time.", "No rush from my side.",
        "I do not mind waiting.", "Later is fine too.", "It does not matter when.",
        "Please do not hurry because of me.", "An answer next week will do.",
    ),
    0.0: (
        "I have been a customer for years.", "I saw your shop in a magazine.",
        "My sister told me about you.", "I paid by card.", "The weather here is awful.",
        "I live on the second floor.", "My neighbour took the parcel in.",
        "I use your website now and then.", "I also have your catalogue here.",
        "My husband set up the account.", "We have a small garden.", "I am 82 years old.",
        "It was my first order with you.", "I usually buy in town.", "We moved here in spring.",
    ),
}
PROBLEMS = (
    "the {item} arrived broken", "half of the parcel is missing", "I was charged twice",
    "the lid does not close", "the box was empty", "the {item} stopped working after two days",
    "my refund has not come", "the colour is wrong", "the discount was not taken off",
    "the {item} is badly scratched", "the parcel never arrived", "a cable is missing",
    "the {item} has a crack", "your courier left it in the rain", "the handle came off",
    "the invoice shows the wrong name", "the {item} is too small", "the screen stays dark",
    "nobody picks up the phone", "the money was taken two times", "the {item} smells of smoke",
    "my voucher is refused", "the tracking page shows nothing", "the {item} leaks",
    "the package got lost on the way", "the seller was rude", "the paint is coming off",
    "I got somebody else's goods", "the battery is dead", "the {item} does not switch on",
    "there are stains on the {item}", "the manual is in the wrong language",
    "you sent me two of them", "the zip is stuck", "the parcel came a week too late",
    "one leg of the {item} is bent", "I cannot log in any more", "the glass is in pieces",
    "your app keeps crashing", "the screws do not fit", "the {item} makes a terrible noise",
    "the delivery went to my old address", "the seam came apart after one wash",
    "the {item} is not what I ordered", "the box was open and wet", "the plug gets hot",
    "my account was closed without a word", "the size on the label is false",
    "the {item} wobbles", "the payment failed three times",
)
ITEMS = (
    "kettle", "desk lamp", "blanket", "clock", "toaster", "rucksack", "radio", "garden chair",
    "mirror", "coffee grinder", "bookshelf", "tent", "umbrella", "phone case", "rug", "hairdryer",
    "bicycle pump", "wool coat", "printer", "saucepan", "watch", "armchair", "keyboard", "pillow",
    "camera",
)
ORDERS = (  # 9 stands for a digit, A for a letter
    "#99999", "A-99999", "9999999", "AA-9999", "ORD99999", "99999-99", "999-9999", "A999999",
    "99/99999", "9999-A", "2025-9999", "999 999", "AA 99999", "#A9999", "9999-99-99",
    "AAA-999-99", "99A9999", "#99-9999", "999999", "A9-99999", "99.999.99", "A/99999", "9999/A",
    "AA999999", "#999999",
)
PRICES = (
    "39.90 €", "£15", "120 euros", "$48.50", "EUR 7", "£ 260", "19 €", "75 pounds", "€ 9.99",
    "33.10 $", "EUR 18.20", "$ 5", "9 dollars", "1,250 €", "27 €", "£8.75", "€80", "14 euros",
    "EUR 310", "66.40 €",
)
GREETINGS = (
    "Hello,", "Dear Sir or Madam,", "Hi,", "Good morning,", "Dear all,", "Hey,", "Good evening,",
    "Dear customer service,", "Hi there,", "To whom it may concern,",
)
CLOSINGS = (
    "Kind regards", "Yours sincerely", "Best", "Regards", "Bye", "Best wishes", "Thanks in advance",
    "Greetings", "Yours faithfully", "Have a nice day",
)
NAMES = (
    "Anna Berg", "T. Okafor", "Luis Romero", "Mia Novak", "J. Ito", "Priya Nair", "Paul Weiss",
    "Sam Boyle", "E. Dubois", "Olga Petrova",
)
