package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/term"
)

// canAsk reports whether somebody may answer a question.
func (a *app) canAsk() bool {
	in, ok := a.stdin.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(in.Fd()))
}

// confirm says what is about to be lost, and refuses unless a person types the word.
// Ctrl-C is an answer as well.
func (a *app) confirm(ctx context.Context, loss, word string) error {
	fmt.Fprintf(a.stderr, "%s Type %s to go on: ", loss, word)
	line, err := orLeave(ctx, func() (string, error) { return bufio.NewReader(a.stdin).ReadString('\n') })
	if ctx.Err() != nil {
		fmt.Fprintln(a.stderr)
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if strings.TrimSpace(line) != word {
		return refusal{errors.New("not confirmed; nothing was changed")}
	}
	return nil
}
