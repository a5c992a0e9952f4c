"""Fuzzing of the real server: ``make fuzz``, or ``python -m tests.fuzz``. docs/testing.md says how it is used.

    corpus     pictures: good ones of every format, damaged ones, hostile ones
    wishes     what a caller asks for, good or wrong, whatever the door
    grpc_cases, http_cases, control_cases
               cases: the bytes that go to a door, and the answers that are right
    cases      a case, its file, and the choice of the next one
    callers    send a case over real sockets
    judge      is an answer a good picture, or one clear refusal under its right code?
    watch      the server's processes, memory and log
    run        all of it, with a table at the end

A case is made from the seed and its number alone, so that it can be made again.
"""
