// Command imagewolf is the daemon of an ImageWolf node and the operator's tool
// beside it. Everything it does is in package command.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/imagewolf/imagewolf/cmd/imagewolf/command"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command.App().RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "imagewolf: %v\n", err)
		os.Exit(command.ExitStatus(err))
	}
}
