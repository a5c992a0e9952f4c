"""Pictures: files to pixels and back, faces, and the crop that the model gets.

    imaging     files to pixels and back
    damage      mending files that browsers show all the same
    finder      where faces are
    faces       the part of a picture that is used
    prepare     all of it, for one picture

``python -m icportrait.pictures FILE`` prints the steps for one file. Every function here is called from any thread, and
keeps no state but the face finder.
"""
