"""The denoising loop: one batch for all requests. Requests join and leave the batch between any two steps.

    job         a request on its way through the loop, and its result
    scheduler   the choice of jobs that leave the batch before its next step, and of jobs that join it
    batch       the jobs' rows in the engines: the warping of joining jobs, a step of all
    loop        the thread that does all of it, in turns
    thread      the thread and the inbox of the loop
    times       the time that steps take

The loop's thread owns the scheduler, the batch and every job that was submitted. Other threads call
``DenoisingLoop.submit``, ``Job.cancel`` and ``Job.go_on``. Each of these leaves a message in the loop's inbox. Any
thread may read ``icportrait.pace.Pace``, and the gateway's line writes to it when requests arrive and are answered.
"""
